"""Files -> batches: text corpora, records, instructions."""
