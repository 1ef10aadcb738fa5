"""A package as somebody else would write it: one of each thing that qat_runner can be given, a file each."""
