"""What an anonymization prompt is and does: files, placement, transfer, identity scores. Needs torch and safetensors.

Nothing is imported here, so that a host pays only for what it uses.
"""
