"""What benchmarks/faults.py and the fault tests share: small runs, faults planted in them, and what must come out."""
