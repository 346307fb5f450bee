"""The Barlow Twins losses of other projects, by their names and call signatures: change the import, keep the rest.

One module per project; docs/migration.md lists them with what stays and what changes.
"""
