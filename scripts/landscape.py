"""Draw the objective around a run: python scripts/landscape.py run=outputs/digits-mlp-sgd/…"""

from gdtrain.cli import landscape_main

if __name__ == "__main__":
    landscape_main()
