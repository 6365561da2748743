"""Write `golden/weights.safetensors` anew: ``python compat_tests/write_golden_weights.py``."""

from harness.oracles.golden_weights import FILE, write

if __name__ == "__main__":
    write()
    print(f"{FILE}: {FILE.stat().st_size} bytes")
