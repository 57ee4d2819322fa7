"""Pure rules that keep secrets and personal data inside: the gate of every exported label value and of every log line.

Flows in: names and values as containers and clients gave them. Flows out: the same text, unharmed where it is plain,
with `[redacted]` in place of what looks like a secret. No input or output is done here.

Known limit: a secret of exactly 32, 40 or 64 hexadecimal digits cannot be told from a UID, a revision or a container
id by its looks; only the name it stands under (`redact`) gives it away.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

REDACTED = "[redacted]"
LABEL_LENGTH = 256
"""Characters of a label value at most, the mark of the cut included."""
_CUT = "…"
_SLACK = 4096
"""Characters read beyond the cut, so that a secret that begins before it is still known as one."""
_WORD = 256
"""Characters of a last word that go with the cut."""

_PLAIN = re.compile(
    r"""(?:(?:GUARD[a-z0-9]{0,19}+|[0-9a-f]{64})(?![a-z0-9])(?:[._/:]|-(?![0-9]{4,6}+\b)))*+
       (?:GUARD[a-z0-9]{0,19}+|[0-9a-f]{64}(?![a-z0-9]))
       (?:@sha256:[0-9a-f]{64})?
      |[A-Z][A-Za-z_]{0,15}+
    """.replace(
        "GUARD",
        r"(?![0-9]{13}|xox|github_|gl[a-z]++-|sk-|hv[sbr]\.|d(?:ckr|o[opr])_|whsec|bearer|authoriz|passw"
        r"|[a-z0-9]{6}\.[a-z0-9]{16}(?![a-z0-9]))",
    ),
    re.VERBOSE,
)
"""What can hold no secret by its form: short words of small letters and digits between separators, ids, states.

Most label values are of this kind, so most pass with this one match. What it accepts, `scrub` leaves as it is.
"""

_TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""A control sequence of terminals (ECMA-48, section 5.4), which ends in a letter."""
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]",
)
"""Control characters, invisible and direction marks (they make text read as what it is not), lone surrogates."""

# --- names ---------------------------------------------------------------------------------------------------------

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORD = re.compile(
    r"(?:apikey|auth|authorization|basicauth|bearer|cookie|cred|credential|cvv|dsn|iban|jwt|key|keyfile|keypair|keystore"
    r"|keytab|mnemonic|otp|pass|passcode|passphrase|passwd|password|pat|psk|pwd|salt|secret|ssn|token|totp)s?",
)
_SECRET_COMPOUND = re.compile(
    r"passw(?:or)?d|passphrase|passcode|secret(?!ar)|credential|connectionstring|tokens?$"
    r"|^(?:db|user|root|admin|my|smtp|ftp|mail|ldap|redis|mysql|postgres|pg)(?:pass|pwd)$"
    r"|(?:api|access|account|aes|app|auth|client|crypt|deploy|encryption|gpg|hmac|host|jwt|license|master|pgp|priv|private"
    r"|public|rsa|server|service|session|shared|signing|ssh|ssl|storage|tls|wg)keys?$",
)
"""Compounds that are written without a separator, such as `PGPASSWORD` or `sshkey`."""


def _is_secret_name(name: str) -> bool:
    """Judge a name word by word: words end at anything that is no letter and at a capital after a small letter."""
    words = [word.lower() for word in _WORDS.findall(name[:1024])]
    if any(_SECRET_WORD.fullmatch(word) or _SECRET_COMPOUND.search(word) for word in words):
        return True
    return "connectionstring" in "".join(words)


# --- values --------------------------------------------------------------------------------------------------------

_MARKED = re.compile(
    r"""-----BEGIN\ [A-Z0-9 ]++-----(?s:.*?(?:-----END\ [A-Z0-9 ]++-----|\Z))        # PEM, RFC 7468
      |(?i:\bauthorization["']?\s*+[:=]\s*+["']?(?:[a-z-]++\s++)?[^\s"',;]++)        # HTTP header, RFC 9110
      |(?i:\bbearer(?:\s*+[:=]\s*+|\s++)[\w.~+/=-]++)                                # RFC 6750
      |\bBasic\s++[A-Za-z0-9+/]{4,}+={1,2}                                           # RFC 7617
      |(?<![A-Za-z0-9])(?:
         eyJ[\w-]{6,}+(?:\.[\w-]*+){1,4}                                             # JWT, JWE: RFC 7519, RFC 7516
        |(?:AKIA|ASIA|ABIA|ACCA|AGPA|AIDA|AIPA|ANPA|ANVA|AROA)[A-Z0-9]{16}(?![A-Za-z0-9])  # AWS unique ids
        |AIza[\w-]{35}|ya29\.[\w-]{10,}+|GOCSPX-[\w-]{20,}+                          # Google Cloud
        |gh[a-z]_[A-Za-z0-9]{20,}+|github_pat_\w{20,}+                               # GitHub
        |gl(?:agent|cbt|dt|ffct|ft|imt|oas|pat|ptt|rt|soat)-[\w-]{20,}+              # GitLab
        |xox[a-z](?:\.xox[a-z])?-(?=[\w-]{0,64}\d)[\w%-]{10,}+|xapp-\d-[\w-]{10,}+        # Slack
        |[srp]k_(?:live|test)_\w{10,}+|whsec_\w{16,}+                                # Stripe
        |sk-(?:[a-z]{1,16}+-){0,4}+[A-Za-z0-9_]{20}[\w-]*+                                   # OpenAI, Anthropic
        |(?:npm|hf)_[A-Za-z0-9]{30,}+|pypi-AgE[\w-]{20,}+                            # npm, Hugging Face, PyPI
        |dckr_pat_[\w-]{20,}+|do[opr]_v1_[0-9a-f]{40,}+                              # Docker Hub, DigitalOcean
        |hv[sbr]\.[\w-]{20,}+|SWMTKN-1-[\w-]{20,}+|SG\.[\w-]{16,}+\.[\w-]{16,}+      # Vault, Swarm, SendGrid
        |(?:dapi|key-|SK|shp(?:at|ca|pa|ss)_)[0-9a-f]{32}(?![A-Za-z0-9])  # Databricks, Mailgun, Twilio, Shopify
        |glsa_\w{20,}+|AGE-SECRET-KEY-1[0-9A-Z]{40,}+                                # Grafana, age
       )
      |hooks\.slack\.com/(?:services|workflows)/T[\w/]++
      |(?i:passw(?:or)?d|passphrase)\s?:\s?[^\s"']++                                 # in running text
      |(?i:(?<![\w-])[\w-]{0,32}(?:token|secret|credential|private[_-]?key|psk
         |(?:key|certificate|authority)-data)["']?\s?:\s++["']?
         (?=[^\s"',}\]]{0,99}\d)[^\s"',}\]]{8,}+)                                    # YAML, such as a kubeconfig's
      |(?:rfc\d{4}|gcm|cbc|ctr|ccm|hmac)(?:\([\w()-]{1,40})\s++["']?(?:0x)?[0-9a-fA-F]{32,}+    # IPsec, ip-xfrm(8)
      |\$(?:2[abxy]?\$\d\d|[567y]|gy|sha1|scrypt|argon2(?:id|i|d))\$[\w./+=,$-]{22,}+  # crypt(5), PHC strings
      |\$(?:1|apr1)\$[\w./]{1,8}\$[\w./]{22}
      |\bpbkdf2[_-]sha\d{1,3}\$\d++\$[\w.+/-]{1,64}\$[\w.+/=-]{20,}+                    # Django
    """,
    re.VERBOSE,
)
"""Secrets that carry a mark of their own."""

_USERINFO = re.compile(
    r"""(?P<keep>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?:
          [^\s/@:\[]*+:[^\s/]{0,1024}@                 # user:password@, RFC 3986, 3.2.1
         |[^\s/@:\[]*+:(?![0-9]{1,5}[/?#])\S{0,1024}@  # the same, with a slash that should have been escaped
         |[^\s/@:\[]{8,}+@                             # token@
        )
      |(?<![\w:/@.-])[\w.-]{1,64}+:[^\s@/]{1,128}+@(?=tcp\(|unix\(|(?!sha\d)[\w.-]++:[0-9]{2,5}(?![0-9A-Za-z]))  # DSN
    """,
    re.VERBOSE,
)
"""What stands before the host in an address."""
_NAMED = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]{1,64}+)(?:=|\\{0,3}["']\s?:\s?(?=\\{0,3}["'0-9]))
      |(?<![\w-])--?(?P<option>[A-Za-z][\w-]{1,64}+)\s++(?!-)
    """,
    re.VERBOSE,
)
"""What stands before a value: `name=value`, `"name": "value"` (in JSON within JSON too) and `--name value`."""
_VALUE = re.compile(r"""\\{0,3}"[^"]*+"?|\\{0,3}'[^']*+'?|[^\s"'&;]++""")
_ARGUMENT = re.compile(r""""[^"]*+"?|'[^']*+'?|[^\s"']++""")
_COMMAND = re.compile(
    r"""(?P<keep>\b(?:
          (?:mysql|mariadb)\w*+\b[^\n|;&]{0,256}?\s-p
         |(?:sshpass|mongo(?:sh|dump)?|(?:docker|podman|helm|skopeo|crictl)\b[^\n|;&]{0,64}?\slogin)\b
            [^\n|;&]{0,256}?\s-p\s*+
         |(?:curl|wget)\b[^\n|;&]{0,256}?\s(?:-[uU]|--user|--proxy-user)[\s=]?[^\s:/]{1,128}:(?!//)
         |redis-cli\b[^\n|;&]{0,256}?\s-a\s++
         |ldap\w++\b[^\n|;&]{0,256}?\s-w\s++
         |(?:sqlcmd|bcp)\b[^\n|;&]{0,256}?\s-P\s*+
         |smbclient\b[^\n|;&]{0,256}?\s-U\s?[^\s%]{1,128}%
        ))(?:"[^"]*+"?|'[^']*+'?|[^\s"']++)
    """,
    re.VERBOSE,
)
"""Passwords that commands take behind a short option; which one it is, depends on the command."""
_BOOTSTRAP = re.compile(r"(?<![\w.-])[a-z0-9]{6}\.([a-z0-9]{16})(?![\w.-])")
"""A bootstrap token of Kubernetes (kubernetes/cluster-bootstrap, token/util)."""
_EMAIL = re.compile(
    r"(?<![\w.%+-])(?!git@)[\w.%+-]{1,64}+@(?:[\w-]{1,63}+\.){1,8}"
    r"(?!(?:automount|device|mount|path|scope|service|slice|socket|swap|target|timer)\b)[^\W\d_]{2,24}\b(?![.-]?\w)",
)
"""An address with a dotted domain; systemd's template units (`user@1000.service`) look like one and are none."""
_CARD = re.compile(
    r"(?<![\w.])(?<!\d-)"
    r"(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{15,16})(?!\w|[.-]\d)",
)
_CARD_ISSUER = re.compile(r"3[0-9]|4|5[0-9]|6|2[2-7]")
"""First digits of payment cards (ISO/IEC 7812)."""
_RUN = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{16,}+={0,2}")
_DENSE = re.compile(r"[a-z0-9]{30,}|[A-Z0-9]{30,}")
_PIECES = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_IDENTIFIER = re.compile(r"[a-z]{0,12}(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})", re.IGNORECASE)
_TOKEN_LENGTH = 24
"""Shorter ones cannot be told from names: 24 characters of base64 are 144 bits, about the least that is in use."""
_AWS_SECRET = re.compile(r"[A-Za-z0-9+][A-Za-z0-9+/]{39}")
_DIGESTS = ("sha384:", "sha512:")
_SHA2 = re.compile(r"[0-9a-f]{96}(?:[0-9a-f]{32})?")


def _luhn(digits: str) -> bool:
    """Tell whether the check digit is right (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        number = int(digit) * (1 + place % 2)
        total += number - 9 if number > 9 else number  # noqa: PLR2004 - the digits of a two-digit number are added
    return total % 10 == 0


def _card(match: re.Match[str]) -> str:
    digits = re.sub(r"\D", "", match[0])
    return REDACTED if _CARD_ISSUER.match(digits) and _luhn(digits) else match[0]


def _is_random(text: str, longest: float) -> bool:
    """Tell random text from names: names fall into words, random text into pieces of two characters or so."""
    pieces = _PIECES.findall(text)
    return bool(pieces) and sum(map(len, pieces)) / len(pieces) < longest


def _is_base64(run: str) -> bool:
    """Tell base64 (RFC 4648, both alphabets) from paths and names: their words do not mix the cases."""
    mixed = [part for part in re.split("[+/_-]", run) if re.search("[a-z]", part) and re.search("[A-Z]", part)]
    if sum(map(len, mixed)) * 2 < len(run):
        return False
    if run.endswith("="):
        return _is_random(run, 3.5)
    if len(run) < _TOKEN_LENGTH or not re.search("[0-9]", run):
        return False
    return _is_random(run, 3.6 if _AWS_SECRET.fullmatch(run) else 2.9)


def _dense(match: re.Match[str]) -> str:
    """Redact long runs of letters of one case and digits, except what has the form of an id."""
    run = match[0]
    return REDACTED if _is_random(run, 5) and not _IDENTIFIER.fullmatch(run) else run


def _run(match: re.Match[str]) -> str:
    start = match.start()
    if match.string[max(0, start - 7) : start] in _DIGESTS and _SHA2.fullmatch(match[0]):
        return match[0]
    return REDACTED if _is_base64(match[0]) else _DENSE.sub(_dense, match[0])


def _bootstrap(match: re.Match[str]) -> str:
    """Tell a token's second half from a word: `worker.kubernetesnode01` is a host."""
    return REDACTED if _is_random(match[1], 5.5) else match[0]


def _userinfo(match: re.Match[str]) -> str:
    return f"{match['keep'] or ''}{REDACTED}@"


def bounded(text: str, limit: int) -> str:
    """Cut to at most `limit` characters (512 or more) what is not judged yet, and its last word with it.

    A secret that has lost its end may not look like one any more.
    """
    if len(text) <= limit:
        return text
    return text[: limit - _WORD] + text[limit - _WORD : limit].rpartition(" ")[0]


@dataclass(frozen=True, slots=True)
class Rules:
    """What is secret: the built-in rules and the user's own. Safe from any thread."""

    deny_names: Sequence[str] = ()
    """Further regular expressions; a name that one is found in is secret."""
    deny_values: Sequence[str] = ()
    """Further regular expressions; a value that one is found in is redacted as a whole."""
    _names: re.Pattern[str] | None = field(init=False, repr=False, compare=False)
    _values: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile the user's expressions; raises re.error for one that is wrong."""
        object.__setattr__(self, "_names", _any_of(self.deny_names))
        object.__setattr__(self, "_values", _any_of(self.deny_values))

    def secret_key(self, name: str) -> bool:
        """Tell whether what stands under `name` (a label, a variable, a setting) must not be shown."""
        return _is_secret_name(name) or (self._names is not None and self._names.search(name) is not None)

    def redact(self, key: str, value: str) -> str:
        """Return `value` as it may be exported under `key`."""
        return REDACTED if self.secret_key(key) else self.safe_label(value)

    def safe_label(self, value: str) -> str:
        """Return `value` as it may be exported: printable, at most 256 characters, without secrets."""
        if self._values is None and len(value) <= LABEL_LENGTH and _PLAIN.fullmatch(value):
            return value
        # First what cannot be printed: a secret behind a colour code must not look like another word.
        shown = _UNPRINTABLE.sub("\ufffd", _TERMINAL.sub("\ufffd", bounded(value, LABEL_LENGTH + _SLACK)))
        clean = self.scrub(shown)
        if len(clean) <= LABEL_LENGTH and len(value) <= LABEL_LENGTH + _SLACK:
            return clean
        return clean[: LABEL_LENGTH - 1] + _CUT

    def scrub(self, text: str) -> str:
        """Put `[redacted]` in place of every secret in `text`; what is harmless stays as it is."""
        if self._values is not None and self._values.search(text):
            return REDACTED
        text = _MARKED.sub(REDACTED, text)
        if "@" in text:
            text = _EMAIL.sub(REDACTED, _USERINFO.sub(_userinfo, text))
        if " -" in text:
            text = _COMMAND.sub(rf"\g<keep>{REDACTED}", text)
        if "." in text:
            text = _BOOTSTRAP.sub(_bootstrap, text)
        return _RUN.sub(_run, _CARD.sub(_card, self._without_named(text)))

    def _without_named(self, text: str) -> str:
        """Redact what stands under a secret name. Under another name there may be more names: `x="password=y"`."""
        parts, copied, at = [], 0, 0
        while named := _NAMED.search(text, at):
            at = named.end()
            # "key" alone is too common a word in running text to mean a secret there.
            name = named["name"] or named["option"]
            if name.lower() in {"key", "keys"} or not self.secret_key(name):
                continue
            value = (_VALUE if named["name"] else _ARGUMENT).match(text, at)
            if value:
                parts += [text[copied:at], REDACTED]
                copied = at = value.end()
        return "".join((*parts, text[copied:]))


def _any_of(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """Join expressions into one; each must be valid by itself, so that none can close another's group."""
    for pattern in patterns:
        re.compile(pattern)
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None


DEFAULT = Rules()
"""The built-in rules alone."""

secret_key: Callable[[str], bool] = DEFAULT.secret_key
redact: Callable[[str, str], str] = DEFAULT.redact
safe_label: Callable[[str], str] = DEFAULT.safe_label
