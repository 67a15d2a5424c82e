"""Adapter files of other libraries: read into what onebase stores, and written from it, each exactly or not at all."""
