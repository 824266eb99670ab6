"""Find a learning rate: python scripts/find_lr.py data=digits model=mlp optimizer=sgd"""

from gdtrain.cli import find_lr_main

if __name__ == "__main__":
    find_lr_main()
