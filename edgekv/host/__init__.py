"""The machine that this process runs on: memory, CPUs, instruction sets, cgroups."""
