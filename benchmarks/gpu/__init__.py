"""GPU benchmarks and checks: correctness, times and memory, in one resumable run. See README.md."""
