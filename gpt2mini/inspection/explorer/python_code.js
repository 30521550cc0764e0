// The view as a short Python script: what the chosen head attends to and what comes next, before
// and after the interventions, with gpt2mini's own functions.

import { namesOfPart, partLabel, patchInForce } from "./patches.js";

/** The script for the state of the page. */
export function pythonCode(app) {
  const shown = app.state.model;
  const parts = [
    headingLines(app),
    importLines(app),
    loadingLines(app, shown, "model"),
    textLines(app),
    showLines(app),
    resultLines(app, shown, "model"),
  ];
  if (showsBothModels(app)) {
    parts.push(loadingLines(app, 1 - shown, "other"), resultLines(app, 1 - shown, "other"));
  }
  return parts.map((lines) => lines.join("\n")).join("\n\n") + "\n";
}

function showsBothModels(app) {
  return app.sources.length > 1 && app.state.right === "compare";
}

// ---- the beginning

function headingLines(app) {
  const { name, precision } = app.data.models[app.state.model];
  const lines = [`# The view of the page of ${escapedForPython(name)}, computed with gpt2mini.`];
  if (precision) {
    lines.push(`# The page computes with ${precision} weights: its numbers differ slightly.`);
  }
  return lines;
}

function importLines(app) {
  const models = showsBothModels(app) ? app.data.models : [app.data.models[app.state.model]];
  const inspection = [
    ...(hasMeans(app) ? ["mean_activations"] : []),
    ...(hasInterventions(app) ? ["patched"] : []),
    "trace",
  ];
  const rules = samplingLines(app.state).map((line) => /= (\w+)\(/.exec(line)[1]);
  return [
    "import torch",
    "",
    "from gpt2mini import GPT2, Tokenizer",
    ...(hasMeans(app) ? ["from gpt2mini.data.samples import sample"] : []),
    `from gpt2mini.inspection import ${inspection.join(", ")}`,
    ...(models.some(({ adapter }) => adapter) ? ["from gpt2mini.lora import load_adapter"] : []),
    ...(rules.length ? [`from gpt2mini.sampling import ${[...new Set(rules)].join(", ")}`] : []),
  ];
}

/** The page has names, never a path of the machine where it was made. */
function loadingLines(app, index, variable) {
  const { base, adapter } = app.data.models[index];
  const lines = [
    "# A model from a folder: put its path in place of the name.",
    `${variable} = GPT2.from_pretrained(${pythonString(base)})`,
  ];
  if (adapter) {
    lines.push("# Put the adapter's path in place of its name.");
    lines.push(`load_adapter(${variable}, ${pythonString(adapter)})`);
  }
  if (variable === "model") {
    lines.push(`tokenizer = Tokenizer.from_pretrained(${pythonString(base)})`);
  }
  return lines;
}

function textLines(app) {
  const { layer, text } = app.state;
  const ids = text === "" ? "[tokenizer.eos_id]" : `tokenizer.encode(${pythonString(text)})`;
  const cut = app.tokensLeftOut ? `[:${app.tokenIds.length}]` : "";
  return [
    `token_ids = torch.tensor([${ids}${cut}])  # (1, tokens)`,
    `position = ${app.token}  # ${labelInComment(app, app.tokenIds[app.token])}`,
    `target = ${app.target}  # ${labelInComment(app, app.target)}`,
    `names = ["blocks.${layer}.attention", "logits"]`,
  ];
}

function showLines(app) {
  const { layer, head } = app.state;
  return [
    "",
    "def show(title, activations):",
    `    weights = activations["blocks.${layer}.attention"][0, ${head}, position]  # (tokens)`,
    `    print(f"{title}: head ${layer}.${head} attends to")`,
    "    for key in weights.argsort(descending=True)[:5].tolist():",
    "        token = tokenizer.decode([token_ids[0, key].item()])",
    '        print(f"  {weights[key]:.6f}  {key} {token!r}")',
    '    logits = activations["logits"][:, position]  # (1, vocab)',
    ...forbiddenLines(app),
    "    probability = logits.softmax(dim=1)[0, target]",
    '    print(f"{title}: {tokenizer.decode([target])!r} comes next with {probability:.6f}")',
    ...samplingLines(app.state),
    "    probabilities = logits.softmax(dim=1)[0]  # (vocab)",
    "    for token_id in probabilities.argsort(descending=True)[:5].tolist():",
    '        print(f"  {probabilities[token_id]:.6f}  {tokenizer.decode([token_id])!r}")',
    "",
  ];
}

function forbiddenLines(app) {
  if (!app.data.forbidden_ids.length) return [];
  return [
    "    # The vocabulary is padded: some ids have no token.",
    "    logits[:, tokenizer.missing_ids(logits.shape[1])] = -torch.inf",
  ];
}

/** In the order of gpt2mini.sampling. Temperature 0: only the most likely token is left. */
function samplingLines({ temperature, topK, topP }) {
  const greedy = temperature === 0;
  return [
    ...(greedy ? ["    logits = keep_top_k(logits, 1)  # temperature 0"] : []),
    ...(greedy || temperature === 1 ? []
      : [`    logits = divide_by_temperature(logits, ${temperature})`]),
    ...(topK > 0 ? [`    logits = keep_top_k(logits, ${topK})`] : []),
    ...(topP < 1 ? [`    logits = keep_top_p(logits, ${topP})`] : []),
  ];
}

// ---- the model's numbers, before and after the interventions

function resultLines(app, index, variable) {
  const { name } = app.data.models[index];
  const plain = `show(${pythonString(name)}, trace(${variable}, token_ids, names=names))`;
  if (!hasInterventions(app)) return [plain];
  return [
    plain,
    "",
    ...meansLines(app, variable),
    ...secondTextLines(app, variable),
    "patches = {",
    ...app.state.off.flatMap(patchLines),
    ...patchFromSecondLines(app),
    "}",
    `with patched(${variable}, patches):`,
    `    activations = trace(${variable}, token_ids, names=names)`,
    `show(${pythonString(name + " with the interventions")}, activations)`,
  ];
}

/** The same means as in the page: see `means` in model_data.py. */
function meansLines(app, variable) {
  if (!hasMeans(app)) return [];
  const parts = app.state.off.filter(({ value }) => value === "mean");
  const names = [...new Set(parts.flatMap(namesOfPart))].map((name) => `    "${name}",`);
  const width = app.data.most_tokens;
  return [
    "# The means over all positions of a bundled text, as in the page.",
    'general = tokenizer.encode(sample("general.txt").read_text(encoding="utf-8"))',
    `rows = max(1, len(general) // ${width})`,
    `general_ids = torch.tensor(general[: rows * ${width}]).view(rows, -1)  # (rows, ${width})`,
    `mean_of = mean_activations(${variable}, general_ids, [`,
    ...names,
    "])",
    "",
  ];
}

function patchLines(part) {
  return namesOfPart(part).map((name) => {
    const value = part.value === "mean" ? `mean_of["${name}"]` : "0";
    return `    "${name}": ${value},  # ${partLabel(part)}`;
  });
}

function secondTextLines(app, variable) {
  const patch = patchInForce(app);
  if (!patch) return [];
  const name = `blocks.${patch.layer}.stream`, most = app.data.most_tokens;
  const cut = app.tokenizer.encode(patch.text).length > most ? `[:${most}]` : "";
  const ids = `tokenizer.encode(${pythonString(patch.text)})${cut}`;
  return [
    `second_ids = torch.tensor([${ids}])  # (1, tokens)`,
    `second = trace(${variable}, second_ids, names=["${name}"])["${name}"]  # (1, tokens, emb)`,
    "",
    "",
    "def from_second_text(stream):",
    "    changed = stream.clone()  # (1, tokens, emb)",
    `    changed[:, ${patch.position}] = second[:, ${patch.from}]`,
    "    return changed",
    "",
    "",
  ];
}

function patchFromSecondLines(app) {
  const patch = patchInForce(app);
  return patch ? [`    "blocks.${patch.layer}.stream": from_second_text,`] : [];
}

function hasInterventions(app) {
  return app.state.off.length > 0 || patchInForce(app) !== null;
}

function hasMeans(app) {
  return app.state.off.some(({ value }) => value === "mean");
}

// ---- text in Python

/** A literal of Python: the escapes of JSON, and of everything else that cannot be seen. */
function pythonString(text) {
  return escapedForPython(JSON.stringify(text));
}

function labelInComment(app, id) {
  return escapedForPython(app.label(id));
}

/** Control characters, line separators and the like as \u2028. */
function escapedForPython(text) {
  const hex = (character, width) => character.codePointAt(0).toString(16).padStart(width, "0");
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (character) =>
    (character.length > 1 ? `\\U${hex(character, 8)}` : `\\u${hex(character, 4)}`));
}
