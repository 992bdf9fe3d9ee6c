"""Train a base loss and S2SD on the same images and compare them on unseen classes.

    python examples/train.py
    python examples/train.py --recipe cub-r50-128-msim --root DIR
    python examples/train.py --recipe fine-tuning --dataset folder --root DIR --backbone resnet50
    python examples/train.py --loss ProxyAnchorLoss --miner none --loss-lr 0.03
    torchrun --nproc_per_node=2 examples/train.py
    python examples/train.py --help

Writes config.json, metrics.csv, table.md, pictures, and report.html with all of them, to
``--output``; TensorBoard's events while it trains. Ctrl-C ends it with a checkpoint.
"""

from trainer.main import main

if __name__ == "__main__":
    main()
