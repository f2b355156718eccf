"""Command-line options that the WebUI reads before it loads anything else."""


def preload(parser) -> None:
    """Add this extension's options to the host's."""
    parser.add_argument("--apl-policy", type=str, default=None, metavar="FILE",
                        help="a policy for all users of this server, see docs/hosting.md; overrides APL_POLICY")
    parser.add_argument("--apl-allow-remote-train", action="store_true",
                        help="let users of a server that others can reach start trainings")
    parser.add_argument("--apl-dir", type=str, default=None, metavar="FOLDER",
                        help="folder of anonymization prompts (default: models/anonymization_prompts)")
