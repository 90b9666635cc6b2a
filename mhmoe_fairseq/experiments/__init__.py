"""The papers' tables and figures, our studies and the demo as data, and the runner that trains them. Needs no torch."""

from . import family, images_and_text, language_models, paper_2, rebuttal
from .spec import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for module in (language_models, images_and_text, rebuttal, paper_2, family)
    for experiment in module.EXPERIMENTS
}
