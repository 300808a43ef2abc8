"""Host memory as a cache of the packed file: experts that do not fit are read when they are needed, or before."""
