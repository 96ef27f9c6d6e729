"""ResNet-18 on your own pictures.

They lie in a folder DIR/train/CLASS/* (and val/, test/ likewise), or in DIR/CLASS/*.

With torchvision's weights of ImageNet, if you have their file (resnet18-f37072fd.pth of
https://download.pytorch.org/models), it is a matter of minutes; without them the net is
trained from scratch and wants thousands of pictures. docs/own_pictures.md says more.

Paper:    He et al. 2015 (arXiv:1512.03385), Table 1; fine-tuning of all layers at a small
          rate, as Kornblith et al. 2019 (arXiv:1805.08974) do
Command:  python train.py --config=configs/folder_finetune.py --workdir=runs/own \\
            --config.data.data_dir=DIR
          from torchvision's weights: first
            python -m cvjax.interop.torch resnet18-f37072fd.pth --model=resnet \\
              --fields=depth=18 --num_classes=1000 --image_size=224 \\
              --normalization=imagenet --workdir=runs/imagenet_resnet18
          and then also --config.init_from=runs/imagenet_resnet18 \\
            --config.data.normalization=init_from
          from a run of ours: its folder as init_from, with its network (--config.model...)
          from scratch: --config.optim.learning_rate=0.1
          the new layer alone: --config.optim.freeze="^(?!head)"
          small pictures: --config.data.image_size=64
          more than fit in memory: --config.data.streaming=true --config.data.num_workers=8
Cost:     1,000 steps of 32 images of 224 pixels, 1.81 GMAC per image (forward): minutes on
          a GPU, hours on two CPU cores (with image_size=64 a tenth)
Expected: nothing in general; it depends on the pictures (945 crops of blood cells at 64
          pixels, from scratch: test error 0.32 %, one seed, 9 minutes on one CPU core)
"""

from cvjax.training import default_config


def get_config():
    config = default_config("resnet")
    config.total_steps = 1_000
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 100
    config.train_eval_examples = 0

    config.data.name = "folder"
    config.data.image_size = 224
    config.data.batch_size = 32
    config.data.eval_batch_size = 100
    config.data.normalization = "channel"
    config.data.flip = True

    config.model.depth = 18
    config.model.shortcut = "B"
    config.model.version = "1.5"

    config.optim.learning_rate = 0.01
    config.optim.schedule = "cosine"
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    return config
