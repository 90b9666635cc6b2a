"""The papers' tables and figures, our studies and the demo as data, and the runner that trains them. Needs no torch."""

from . import images_and_text, language_models
from .spec import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (*language_models.EXPERIMENTS, *images_and_text.EXPERIMENTS)
}
