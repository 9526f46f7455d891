"""The commands of the command line, one typed function each."""

import tyro

# Options without their group's prefix; no {None} in the help; positional arguments called by their names.
TYRO = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
