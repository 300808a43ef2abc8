"""What the machine offers: instruction set, memory pages, threads."""
