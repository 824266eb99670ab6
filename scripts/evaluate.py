"""Test metrics of a checkpoint: python scripts/evaluate.py ckpt_path=…"""

from gdtrain.cli import evaluate_main

if __name__ == "__main__":
    evaluate_main()
