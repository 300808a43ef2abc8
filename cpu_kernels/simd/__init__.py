"""Vector kernels written once over LLVM vector types and compiled for an instruction set."""
