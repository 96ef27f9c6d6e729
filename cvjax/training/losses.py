"""What is minimised, as the config has it; the losses themselves are in `cvjax.tasks`."""

import dataclasses

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised; of detectors the loss of their papers, whatever `name` says.

    Attributes:
      name: "softmax" cross entropy (one class per image), or "sigmoid" (each class for
        itself: multi-label; the sum over classes of the binary cross entropies).
      label_smoothing: the fraction of the target that is spread evenly: over all classes by
        "softmax", between yes and no by "sigmoid". Only in training; evaluation reports
        the plain loss.
      auxiliary_weight: of the losses of auxiliary heads, for models that have such (0.3 in
        Szegedy et al. 2014). Only in training.
      kinetic_weight: of the kinetic energy of ODE blocks, for models that have such: the
        time integral of the mean of f**2 (Finlay et al. 2020, arXiv:2002.02798), the
        blocks added up. Slow, straight trajectories take a solver fewer steps. Only in
        training.
      dice_weight: of one less the Dice coefficient, for the task "segmentation"; see
        `tasks.segmentation.dice_losses`.
    """

    name: str = "softmax"
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.3
    kinetic_weight: float = 0.0
    dice_weight: float = 0.0
