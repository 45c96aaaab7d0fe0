"""What only a GPU can settle: correctness, times and memory, in one resumable run. See README.md."""
