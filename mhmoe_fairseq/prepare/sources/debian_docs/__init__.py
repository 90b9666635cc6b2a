"""Text in many languages out of Debian's packages: translated documentation and programs' messages.

A *family* is one kind of text: which packages hold it, and how they are read. Nothing is installed.
"""
