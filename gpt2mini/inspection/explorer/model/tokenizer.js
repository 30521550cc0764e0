// Text <-> token ids: GPT-2's byte-level byte-pair encoding, with the ids of gpt2mini's Tokenizer.
//
// A text is split at added tokens, then into words, each word into UTF-8 bytes, and neighboring
// bytes are merged as long as the vocabulary has the merged piece, the lowest id first. Pieces are
// kept as strings with one character for each byte.

import { bytesFromBase64, gunzip } from "./weights.js";

// How OpenAI's encoder.py splits a text into words. \s of JavaScript is not that of other regular
// expressions (it has U+FEFF and lacks U+0085), so white space is named by its Unicode property.
const WORD_PATTERN = new RegExp(
  "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
    "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
  "gu",
);
const WORD_CHARACTER = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]";
const ENDS_A_WORD = new RegExp(`${WORD_CHARACTER}$`, "u");
const BEGINS_A_WORD = new RegExp(`^${WORD_CHARACTER}`, "u");
const SPACES_BEFORE = /\p{White_Space}*$/u;
const SPACES_AFTER = /^\p{White_Space}*/u;
const UNPRINTABLE = /[\p{C}\p{Z}]/gu;

/** The tokenizer that tokenizer_data.py has packed: base64 of gzipped JSON. */
export async function readTokenizer(base64) {
  const json = await gunzip(bytesFromBase64(base64));
  return new Tokenizer(JSON.parse(new TextDecoder().decode(json)));
}

export class Tokenizer {
  constructor({ pieces, ids, other_tokens: others, added_tokens: added, ...settings }) {
    this.idOf = new Map(pieces.map((piece, i) => [piece, ids ? ids[i] : i]));
    this.bytesOf = new Map(pieces.map((piece, i) => [ids ? ids[i] : i, latin1Bytes(piece)]));
    for (const [text, id] of others) this.bytesOf.set(id, new TextEncoder().encode(text));
    this.addedTokens = new AddedTokens(added);
    this.addPrefixSpace = settings.add_prefix_space;
    this.eosId = settings.eos_id;
    this.words = new Map(); // ids of words that were encoded before
  }

  /** The ids of a text. Special tokens in it, such as <|endoftext|>, are plain text. */
  encode(text) {
    const ids = [];
    for (const part of this.addedTokens.split(wellFormed(text))) {
      if (typeof part === "number") ids.push(part);
      else for (const word of this.wordsOf(part)) {
        for (const id of this.encodeWord(word)) ids.push(id); // a word may have 100,000 of them
      }
    }
    return ids;
  }

  wordsOf(text) {
    const spaced = this.addPrefixSpace && !text.startsWith(" ") ? ` ${text}` : text;
    return spaced.match(WORD_PATTERN) ?? [];
  }

  encodeWord(word) {
    if (!this.words.has(word)) {
      const bytes = latin1(new TextEncoder().encode(word));
      const pieces = this.idOf.has(bytes) ? [bytes] : this.merge([...bytes]);
      this.words.set(word, pieces.map((piece) => this.idOf.get(piece)));
    }
    return this.words.get(word);
  }

  /** Merge neighbors, the pair with the lowest id first, until no pair is in the vocabulary. Equal
   * pairs are merged in one pass from the left, until one comes about that is not after them: so a
   * word of 100,000 letters takes a few passes. */
  merge(pieces) {
    const idOfPair = (left, right) =>
      left === undefined || right === undefined
        ? Infinity : this.idOf.get(left + right) ?? Infinity;
    for (;;) {
      let best = Infinity;
      for (let i = 1; i < pieces.length; i++) {
        best = Math.min(best, idOfPair(pieces[i - 1], pieces[i]));
      }
      if (best === Infinity) return pieces;
      const merged = [];
      let isNext = true; // whether the pair with this id is still the one to merge
      for (let i = 0; i < pieces.length; i++) {
        const [piece, next] = [pieces[i], pieces[i + 1]];
        if (isNext && idOfPair(piece, next) === best) {
          isNext = idOfPair(merged.at(-1), piece + next) > best &&
            idOfPair(piece + next, pieces[i + 2]) > best;
          merged.push(piece + next);
          i++;
        } else {
          merged.push(piece);
        }
      }
      pieces = merged;
    }
  }

  /** The text of token ids; bytes that are not UTF-8 (half a character) become U+FFFD. */
  decode(ids) {
    return decodeBytes(this.bytesOfAll(ids));
  }

  hasToken(id) {
    return this.bytesOf.has(id);
  }

  /** The bytes of one token; they need not be whole characters. */
  tokenBytes(id) {
    if (!this.hasToken(id)) throw new Error(`token id ${id} is not in the vocabulary`);
    return this.bytesOf.get(id);
  }

  bytesOfAll(ids) {
    return Uint8Array.from(ids.flatMap((id) => [...this.tokenBytes(id)]));
  }

  /** A token as a visible name; see `visible`. */
  label(id) {
    return this.hasToken(id) ? visible(this.tokenBytes(id)) : `(no token ${id})`;
  }

  /** Tokens that share a character, grouped: [{text, tokens}], tokens by their places in `ids`. */
  groups(ids) {
    const groups = [];
    let [tokens, bytes] = [[], []];
    ids.forEach((id, i) => {
      tokens.push(i);
      bytes.push(...this.tokenBytes(id));
      if (i + 1 < ids.length && endsInsideCharacter(Uint8Array.from(bytes))) return;
      groups.push({ text: visible(Uint8Array.from(bytes)), tokens });
      [tokens, bytes] = [[], []];
    });
    return groups;
  }
}

/** Splits texts at added tokens, as added_tokens.py: the leftmost wins, of several the longest. */
class AddedTokens {
  constructor(tokens) {
    this.tokens = new Map(tokens.map((token) => [token.content, token]));
    const [first, last] = [false, true].map((late) => tokens.filter((t) => t.normalized === late));
    this.patterns = [first, last].filter((some) => some.length).map(anyOf);
  }

  /** The ids of added tokens and the pieces of text between them, in order. */
  split(text) {
    return this.patterns.reduce(
      (parts, pattern) => parts.flatMap((part) =>
        (typeof part === "string" ? this.splitAt(pattern, part) : [part])),
      text === "" ? [] : [text],
    );
  }

  splitAt(pattern, text) {
    const parts = [];
    let done = 0; // characters of the text that are given out
    for (const { 0: content, index } of text.matchAll(pattern)) {
      const token = this.tokens.get(content);
      let [start, end] = [index, index + content.length];
      if (token.special || (token.single_word && touchesWord(text, start, end))) continue;
      const before = text.slice(done, Math.max(done, start));
      if (token.lstrip) start -= before.match(SPACES_BEFORE)[0].length;
      if (token.rstrip) end += text.slice(end).match(SPACES_AFTER)[0].length;
      if (done < start) parts.push(text.slice(done, start));
      parts.push(token.id);
      done = end;
    }
    if (done < text.length) parts.push(text.slice(done));
    return parts;
  }
}

function anyOf(tokens) {
  const longestFirst = tokens.map((t) => t.content).sort((a, b) => b.length - a.length);
  const escaped = longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"));
  return new RegExp(escaped.join("|"), "gu");
}

/** Whether a letter or the like stands right before or after text.slice(start, end). */
function touchesWord(text, start, end) {
  return ENDS_A_WORD.test(text.slice(0, start)) || BEGINS_A_WORD.test(text.slice(end));
}

// ---- bytes and characters

/** Half of a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD. */
function wellFormed(text) {
  return text.replace(/\p{Surrogate}/gu, "\ufffd");
}

function latin1(bytes) {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
}

function latin1Bytes(text) {
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

function decodeBytes(bytes) {
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
}

/** Whether the bytes end with the beginning of a character. */
function endsInsideCharacter(bytes) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  decoder.decode(bytes, { stream: true });
  return decoder.decode() !== ""; // what waits for more bytes
}

/** Bytes as a visible name: a space as U+2423, a line break as U+23CE, other unprintable characters
 * and parts of characters as escapes of Python, \x07 or \xe4. */
export function visible(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length;) {
    const size = characterSize(bytes.subarray(i, i + 4));
    text += size ? escapeCharacter(decodeBytes(bytes.subarray(i, i + size)))
      : `\\x${hex(bytes[i], 2)}`;
    i += size || 1;
  }
  return text;
}

/** How many bytes the first character has; 0 if there is no whole one. */
function characterSize(bytes) {
  const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });
  for (let size = 1; size <= bytes.length; size++) {
    try {
      strict.decode(bytes.subarray(0, size));
      return size;
    } catch {
      // not whole yet
    }
  }
  return 0;
}

function escapeCharacter(character) {
  if (character === " ") return "\u2423";
  if (character === "\n") return "\u23ce";
  return character.replace(UNPRINTABLE, (one) => {
    const code = one.codePointAt(0);
    if (one === "\t") return "\\t";
    if (one === "\r") return "\\r";
    return code < 256 ? `\\x${hex(code, 2)}` : code < 65536 ? `\\u${hex(code, 4)}`
      : `\\U${hex(code, 8)}`;
  });
}

function hex(number, digits) {
  return number.toString(16).padStart(digits, "0");
}
