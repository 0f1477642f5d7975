"""The kernels in Triton, one op one file. Every file here imports Triton; nothing outside imports them at its top."""
