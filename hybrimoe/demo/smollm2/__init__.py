"""A demo model that can hold a conversation: SmolLM2-135M-Instruct, a dense Llama, taken apart into experts.

`make` reads the dense model of a GGUF file (`dense`), lets it write some text (`samples`), cuts each feed-forward part
into a shared expert and routed ones by what its neurons do on that text (`cutting`), and writes the checkpoint.
Nothing is trained. Importing this package loads neither torch nor transformers.
"""

from hybrimoe.demo.smollm2.place import NAME, made_model_path, packaged_gguf

__all__ = ["NAME", "made_model_path", "packaged_gguf"]
