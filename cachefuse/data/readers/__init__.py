"""Readers turn raw files into samples. A reader is one file and one line here; a manifest names it in `reader.kind`."""

from typing import TYPE_CHECKING

from cachefuse.registry import Registry

if TYPE_CHECKING:
    from cachefuse.data.readers.base import Reader

READERS: "Registry[type[Reader]]" = Registry(
    "reader",
    "cachefuse.readers",
    {
        "cifar": "cachefuse.data.readers.cifar:CifarReader",
        "coco_captions": "cachefuse.data.readers.coco_captions:CocoCaptionsReader",
        "flickr8k": "cachefuse.data.readers.flickr8k:Flickr8kReader",
        "folder": "cachefuse.data.readers.folder:FolderReader",
        "hdf5": "cachefuse.data.readers.hdf5:Hdf5Reader",
        "mmimdb": "cachefuse.data.readers.mmimdb:MmImdbReader",
        "sentence_pairs": "cachefuse.data.readers.sentence_pairs:SentencePairsReader",
        "shapes": "cachefuse.data.readers.shapes:ShapesReader",
        "table": "cachefuse.data.readers.table:TableReader",
        "tiny_imagenet": "cachefuse.data.readers.tiny_imagenet:TinyImageNetReader",
        "vqa2": "cachefuse.data.readers.vqa2:Vqa2Reader",
    },
    base="cachefuse.data.readers.base:Reader",
)
