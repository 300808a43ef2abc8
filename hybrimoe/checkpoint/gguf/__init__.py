"""GGUF, llama.cpp's file format: read as the checkpoint, the configuration and the tokenizer of a model.

`file` reads and checks headers, `tensor_types` decodes blocks, `families` says what each architecture's metadata and
tensors are in transformers' terms, `config`, `weights` and `tokenizer` apply that.
"""
