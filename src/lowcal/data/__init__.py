"""Image data: datasets by name, decoded once or file by file, and batches that are made on the training device."""

from lowcal.data.batches import Batches
from lowcal.data.dataset import Augmentation, Dataset, Files, Images
from lowcal.data.file_batches import FileBatches
from lowcal.data.load import CLASSES, DATASETS, IMAGES, load, make_loader
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
    "load",
    "make_loader",
]
