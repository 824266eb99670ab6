"""Compare the variants: python scripts/compare.py data=digits model=mlp"""

from gdtrain.cli import compare_main

if __name__ == "__main__":
    compare_main()
