"""The problems that a network can be trained for, by name: one file each."""

from cvjax.tasks import classification, detection, multilabel, segmentation

TASKS = {
    "classification": classification.TASK,
    "multilabel": multilabel.TASK,
    "detection": detection.TASK,
    "segmentation": segmentation.TASK,
}
