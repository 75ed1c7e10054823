"""Image data: datasets by name, decoded once, and batches that are made on the training device."""

from lowcal.data.batches import Batches
from lowcal.data.dataset import Augmentation, Dataset, Images
from lowcal.data.load import DATASETS, load

__all__ = ["DATASETS", "Augmentation", "Batches", "Dataset", "Images", "load"]
