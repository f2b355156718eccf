"""One page to make, watch, compare and share prefixes in, for gradio 3.41 to 6: alone (`apl ui`) or as a host's tab.

Needs gradio, apl_core and the standard library. The page never trains: it starts `python -m apl_train ...` in another
interpreter and reads run folders, so that neither a reload, a restart nor a crash of the page loses anything.
"""
