"""Predictions for a file: python scripts/predict.py ckpt_path=… input=… output=…"""

from gdtrain.cli import predict_main

if __name__ == "__main__":
    predict_main()
