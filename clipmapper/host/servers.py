"""Whether a server answers, asked before anything long begins."""

import http.client
import urllib.error
import urllib.request

from clipmapper.errors import UserError

PATIENCE = 10.0  # seconds for an answer


def check_answer(address: str, said: str, instead: str) -> None:
    """Raise ``UserError`` where no server answers at ``address``; a refusal is an answer.

    ``said``: the setting, as the user gives it. ``instead``: what to do without the server.
    """
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE):
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise UserError(
            f"{said}: no answer from {address} within {PATIENCE:.0f} s ({reason}). {instead}"
        ) from error
