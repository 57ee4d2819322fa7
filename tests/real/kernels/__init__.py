"""The kernel tests in virtual machines: Debian's kernels, emulated in software, on the same working tree."""
