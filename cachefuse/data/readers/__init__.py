"""How raw files become samples. A reader is one file and one line here; a manifest names it as `reader.kind`."""

READERS = {
    "flickr8k": "cachefuse.data.readers.flickr8k:Flickr8kReader",
    "folder": "cachefuse.data.readers.folder:FolderReader",
    "hdf5": "cachefuse.data.readers.hdf5:Hdf5Reader",
    "mmimdb": "cachefuse.data.readers.mmimdb:MmImdbReader",
    "shapes": "cachefuse.data.readers.shapes:ShapesReader",
    "table": "cachefuse.data.readers.table:TableReader",
}
