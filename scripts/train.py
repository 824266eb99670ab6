"""Train: python scripts/train.py optimizer=sgd|gd|minibatch (see conf/)."""

from gdtrain.cli import train_main

if __name__ == "__main__":
    train_main()
