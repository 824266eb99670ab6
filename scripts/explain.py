"""One update in full: python scripts/explain.py data=iris model=mlp model.hidden=[2] update=100"""

from gdtrain.cli import explain_main

if __name__ == "__main__":
    explain_main()
