"""A dense model cut into experts without training: how `hybrimoe demo smollm2` makes a model that can answer.

`making` reads the dense model of a GGUF file (`dense`), looks at what its neurons do on some text (`samples`), cuts
each feed-forward part into a shared expert and routed ones (`neurons`, `conversion`), and writes the checkpoint.
"""
