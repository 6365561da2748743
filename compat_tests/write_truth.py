"""Write `reference/truth.safetensors` anew: ``python compat_tests/write_truth.py``."""

from harness.oracles.truth import FILE, write

if __name__ == "__main__":
    write()
    print(f"{FILE}: {FILE.stat().st_size} bytes")
