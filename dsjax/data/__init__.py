"""From text to rows of token ids: sources, tokenizer, packing, preparation, loader."""

import os

# Read by tensorflow_datasets when it is imported: without it, every builder first asks a cloud bucket.
os.environ.setdefault("TFDS_DISABLE_GCS", "1")
