"""Enforced mode: a ComfyUI that serves others puts the prefix into every prompt, whatever the workflow says.

Inject high, verify low, seal conditioning, police the graph, and do not serve when any of it is not in place:

    start       policy -> hooks, start-up checks, route
    hooks       placing hooks, and knowing that they are still there
    guard       which prefix belongs into which text encoder
    encoding    tokenizer, process_tokens, the transformer's door
    seal        conditioning that was encoded here, and what became of it
    derived     conditioning that a pack worked out from what was encoded here
    negative    the negative prompt, which only sometimes needs the prefix
    graph       nodes that are not served
    selftest, status
"""
