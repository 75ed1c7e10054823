"""Image data: datasets by name, strict decoding of image files, and mini-batches made on the training device."""

from lowcal.data.batches import Batches, FileBatches, make_loader
from lowcal.data.dataset import Augmentation, Dataset, Files, Images
from lowcal.data.datasets import CLASSES, DATASETS, IMAGES, load
from lowcal.data.images import available_workers
from lowcal.data.loader import Loader, Shard

__all__ = [
    "CLASSES",
    "DATASETS",
    "IMAGES",
    "Augmentation",
    "Batches",
    "Dataset",
    "FileBatches",
    "Files",
    "Images",
    "Loader",
    "Shard",
    "available_workers",
    "load",
    "make_loader",
]
