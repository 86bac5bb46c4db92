"""The command line before any import of torch: help pages, misspelt keys, messages of the parser.

The parser of `fit` is built from the signatures of classes, so that building it imports torch,
Lightning and diffusers: seconds for a help page. Therefore the help pages of all commands and
classes are written once, as data, into a file of the user's cache (`table`), whose name is a hash
of everything that they depend on. The pages are recorded from the real parser (`recording`) and
printed from the file (`pages`). Keys of arguments and recipes are checked against them (`keys`).

A command that this table does not refuse goes to the real parser, which alone accepts. The table
refuses only what the real parser refuses: where a recipe names a class that is not in it, such as
a user's own, it refuses nothing.
"""
