"""GGUF files: one file, or several parts, with tensors, configuration, tokenizer and chat template.

The header is read in a process of its own, through the gguf package (``header.py``): what that takes, numpy and the
whole vocabulary, then counts in no budget. This process gets what Hugging Face's files would say: a config.json and
tensors under the names that the families know (``config.py``), and if they are asked for the files of a tokenizer
(``tokenizer.py``).
"""
