"""Imported last by the server that ranks are forked from: what is there by then is never garbage.

A collection in a rank would go through all of it, and copy the pages that it writes its marks to.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
