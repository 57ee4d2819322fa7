"""Two hundred secrets of twenty kinds, and two hundred harmless values that look a little like them.

Flows in: a fixed seed. Flows out: the same values on each run and machine. Marks of secrets are put together from
parts, so that no scanner takes this file for a leak.
"""

import base64
import json
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

EACH = 10
"""Values of each kind."""

_UPPER, _LOWER, _DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
_ALNUM = _UPPER + _LOWER + _DIGITS
_URLSAFE = _ALNUM + "-_"
_HEX = "0123456789abcdef"
_HOSTS = ("db.internal", "cache-0.cache.svc", "mq.example.com", "10.4.0.7", "registry.example.com")
_WORDS = (
    "payments",
    "frontend",
    "ingress",
    "telemetry",
    "gateway",
    "scheduler",
    "catalog",
    "orders",
    "search",
    "mailer",
)


@dataclass(frozen=True, slots=True)
class Planted:
    """A secret as it is found in the field."""

    kind: str
    text: str
    core: str
    """What must not be left of it."""


class _Source(random.Random):
    """Random text."""

    def text(self, alphabet: str, length: int) -> str:
        return "".join(self.choices(alphabet, k=length))

    def password(self) -> str:
        """Give what people choose: words, a number, a mark."""
        first, second = self.sample(_WORDS, 2)
        return f"{first.capitalize()}{self.choice('.!_+')}{second}{self.randrange(10, 9999)}"

    def base64(self, size: int) -> str:
        return base64.b64encode(self.randbytes(size)).decode()

    def urlsafe(self, size: int) -> str:
        return base64.urlsafe_b64encode(self.randbytes(size)).decode().rstrip("=")

    def card(self, prefix: str, length: int) -> str:
        """Give a number with the right check digit (ISO/IEC 7812-1, annex B)."""
        digits = prefix + self.text(_DIGITS, length - len(prefix) - 1)
        return next(digits + last for last in _DIGITS if checked(digits + last))

    def pem(self, title: str) -> tuple[str, str]:
        body = self.base64(96)
        return f"-----BEGIN {title}" + f"-----\n{body[:64]}\n{body[64:]}\n-----END {title}-----", body[:64]

    def jwt(self) -> tuple[str, str]:
        header = {"alg": "RS256", "kid": self.text(_URLSAFE, 12), "typ": "JWT"}
        claims = {"iss": "kubernetes/serviceaccount", "sub": f"system:serviceaccount:default:{self.choice(_WORDS)}"}
        parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).decode().rstrip("=") for one in (header, claims)]
        signature = self.urlsafe(64)
        return ".".join((*parts, signature)), signature


def checked(digits: str) -> bool:
    """Tell whether the last digit is the check digit of the others."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number // 10 + number % 10 for number in doubled) % 10 == 0


Pair = tuple[str, str]
"""A secret's text and its core."""


def _whole(text: str, prefix: int = 0) -> Pair:
    return text, text[prefix:]


def _aws_id(r: _Source, _: int) -> Pair:
    return _whole(r.choice(("AK" + "IA", "AS" + "IA")) + r.text(_UPPER + "234567", 16), 4)


def _aws_secret(r: _Source, _: int) -> Pair:
    return _whole(r.base64(30))


def _github(r: _Source, n: int) -> Pair:
    if n % 3 == 0:
        return _whole(f"github{'_pat_'}{r.text(_ALNUM, 22)}_{r.text(_ALNUM, 59)}", 11)
    return _whole(f"gh{'posur'[n % 5]}_{r.text(_ALNUM, 36)}", 4)


def _gitlab(r: _Source, n: int) -> Pair:
    return _whole(f"gl{('pat', 'dt', 'rt', 'cbt', 'ptt')[n % 5]}-{r.text(_URLSAFE, 20)}", 7)


def _slack(r: _Source, n: int) -> Pair:
    ids = f"{r.randrange(10**11, 10**12)}-{r.randrange(10**12, 10**13)}"
    if n % 3 == 0:
        path = f"T{r.text(_UPPER + _DIGITS, 8)}/B{r.text(_UPPER + _DIGITS, 8)}/{r.text(_ALNUM, 24)}"
        return f"https://hooks.slack{'.com/services/'}{path}", path[-24:]
    return _whole(f"xox{'bp'[n % 2]}-{ids}-{r.text(_ALNUM, 24)}", 5)


def _stripe(r: _Source, n: int) -> Pair:
    return _whole(("sk" + "_live_", "rk" + "_live_", "sk" + "_test_", "whsec" + "_")[n % 4] + r.text(_ALNUM, 24), 8)


def _jwt(r: _Source, n: int) -> Pair:
    text, core = r.jwt()
    return (f"Bearer {text}" if n % 2 else text), core


def _pem(r: _Source, n: int) -> Pair:
    titles = ("RSA PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    return r.pem(titles[n % 5])


def _url(r: _Source, n: int) -> Pair:
    scheme = ("https", "postgres", "amqp", "redis", "mongodb+srv", "ftp")[n % 6]
    word = r.password()
    return f"{scheme}://{r.choice(_WORDS)}:{word}@{r.choice(_HOSTS)}/app", word


def _card(r: _Source, n: int) -> Pair:
    digits = r.card(("4", "51", "2221", "6011")[n % 4], 16) if n % 5 else r.card("37", 15)
    if n % 5 == 0:
        return _whole(digits)
    mark = ("", " ", "-")[n % 3]
    return _whole(mark.join(digits[place : place + 4] for place in range(0, 16, 4)))


def _email(r: _Source, n: int) -> Pair:
    name = f"{r.text(_LOWER, 5)}.{r.text(_LOWER, 8)}"
    address = f"{name}@{('example.com', 'mail.example.co.uk', 'corp.example.io')[n % 3]}"
    return (f"Owner <{address}>" if n % 2 else address), name


def _kubeconfig(r: _Source, n: int) -> Pair:
    if n % 3 == 0:
        core = r.text(_LOWER + _DIGITS, 16)
        return f"{r.text(_LOWER + _DIGITS, 6)}.{core}", core  # a bootstrap token
    if n % 3 == 1:
        core = base64.b64encode(r.pem("EC PRIVATE KEY")[0].encode()).decode()
        return f"client-key-data: {core}", core[:60]
    core = r.text(_ALNUM, 16)
    return f"users: [{{name: cni, user: {{token: {core}}}}}]", core


def _tunnel(r: _Source, n: int) -> Pair:
    if n % 3 == 0:
        core = r.text(_HEX, 40)
        return f"3 rfc4106(gcm(aes)) {core} 128", core  # Cilium's form
    if n % 3 == 1:
        core = r.text(_HEX, 48)
        return f"ip xfrm state add src 10.0.0.1 dst 10.0.0.2 proto esp spi 7 enc cbc(aes) 0x{core}", core
    core = r.base64(32)
    return f"[Interface]\nPrivateKey = {core}\nListenPort = 51820", core


def _hash(r: _Source, n: int) -> Pair:
    crypt = _ALNUM + "./"
    if n % 3 == 0:
        return _whole(f"$2{'aby'[n % 3]}$12${r.text(crypt, 53)}", 7)
    if n % 3 == 1:
        return _whole(f"$6${r.text(crypt, 16)}${r.text(crypt, 86)}", 3)
    return _whole(f"$argon2id$v=19$m=65536,t=3,p=4${r.urlsafe(16)}${r.urlsafe(32)}", 31)


def _connection(r: _Source, n: int) -> Pair:
    word, host = r.password(), r.choice(_HOSTS)
    return (
        f"Server={host},1433;Database=app;User Id=sa;Password={word};Encrypt=true",
        f"host={host} port=5432 user=app password={word} sslmode=require",
        f"app:{word}@tcp({host}:3306)/app?parseTime=true",
        f"jdbc:mysql://{host}/app?user=app&password={word}",
        f"Endpoint=sb://{host}/;SharedAccessKeyName=Root;SharedAccessKey={word}",
    )[n % 5], word


def _random(r: _Source, n: int) -> Pair:
    return _whole((r.base64(32), r.urlsafe(32), r.text(_ALNUM, 40), r.text(_LOWER + _DIGITS, 40), r.base64(48))[n % 5])


def _google(r: _Source, n: int) -> Pair:
    if n % 3 == 0:
        return _whole("AI" + "za" + r.text(_URLSAFE, 35), 4)
    if n % 3 == 1:
        return _whole("ya" + "29." + r.text(_URLSAFE, 60), 5)
    text, core = r.pem("PRIVATE KEY")
    account = {"type": "service_account", "private_key_id": r.text(_HEX, 40), "private_key": text}
    return json.dumps(account), core


def _azure(r: _Source, n: int) -> Pair:
    if n % 3 == 0:
        core = r.base64(64)
        return (
            f"DefaultEndpointsProtocol=https;AccountName=logs;AccountKey={core};EndpointSuffix=core.windows.net",
            core,
        )
    if n % 3 == 1:
        core = r.text(_ALNUM, 42)
        return f"https://logs.blob.core.windows.net/c?sv=2022-11-02&sp=r&sig={core}%3D", core
    return _whole(f"{r.text(_ALNUM, 3)}8Q~{r.text(_URLSAFE, 34)}", 3)


def _registry(r: _Source, n: int) -> Pair:
    if n % 3 == 0:
        return _whole("npm" + "_" + r.text(_ALNUM, 36), 4)
    if n % 3 == 1:
        return _whole("pypi" + "-AgEIcHlwaS5vcmc" + r.text(_URLSAFE, 60), 20)
    core = base64.b64encode(f"{r.choice(_WORDS)}:{r.password()}".encode()).decode()
    return json.dumps({"auths": {"registry.example.com": {"auth": core}}}), core


def _command_line(r: _Source, n: int) -> Pair:
    word, host = r.password(), r.choice(_HOSTS)
    return (
        f"/usr/bin/app --password={word} --verbose",
        f"/usr/bin/app --db-password {word}",
        f"mysql -h {host} -uroot -p{word} app",
        f"PGPASSWORD={word} psql -h {host} -U app",
        f"curl -s -u admin:{word} https://{host}/health",
        f"sshpass -p {word} ssh root@{host}",
        f"redis-cli -h {host} -a {word} ping",
        f"app --api-key={word}",
        f"openssl enc -aes-256-cbc -pass pass:{word} -in x",
        f"ldapsearch -x -D cn=admin -w {word} -H ldap://{host}",
    )[n % 10], word


_KINDS: dict[str, Callable[[_Source, int], Pair]] = {
    "aws key id": _aws_id,
    "aws secret key": _aws_secret,
    "github": _github,
    "gitlab": _gitlab,
    "slack": _slack,
    "stripe": _stripe,
    "jwt": _jwt,
    "pem": _pem,
    "basic-auth url": _url,
    "payment card": _card,
    "e-mail": _email,
    "kubeconfig": _kubeconfig,
    "ipsec or wireguard": _tunnel,
    "password hash": _hash,
    "connection string": _connection,
    "random": _random,
    "google cloud": _google,
    "azure": _azure,
    "package registry": _registry,
    "command line": _command_line,
}


def _secrets() -> list[Planted]:
    source = _Source(20)
    return [Planted(kind, *make(source, number)) for kind, make in _KINDS.items() for number in range(EACH)]


SECRETS = _secrets()
"""Each kind's ten, kind by kind."""


def _uuid(r: _Source) -> str:
    return str(uuid.UUID(int=r.getrandbits(128), version=4))


def _ipv6(r: _Source) -> str:
    return "fd00:" + ":".join(f"{r.randrange(1, 65536):x}" for _ in range(7))


def _wrong_card(r: _Source) -> str:
    digits = r.card("4", 16)
    return digits[:-1] + str((int(digits[-1]) + 3) % 10)


def _time(r: _Source) -> str:
    at = datetime.fromtimestamp(r.randrange(10**9, 2 * 10**9), UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{r.text(_DIGITS, 9)}Z"


def _safe_letters(r: _Source, length: int) -> str:
    """Give a suffix as Kubernetes makes them (apimachinery, util/rand): neither vowels nor 0, 1, 3."""
    return r.text("bcdfghjklmnpqrstvwxz2456789", length)


_HARMLESS: dict[str, Callable[[_Source], str]] = {
    "image digest": lambda r: f"registry.example.com:5000/team/{r.choice(_WORDS)}@sha256:{r.text(_HEX, 64)}",
    "layer digest": lambda r: f"sha256:{r.text(_HEX, 64)}",
    "container id": lambda r: r.text(_HEX, r.choice((12, 64))),
    "git revision": lambda r: f"git-{r.text(_HEX, r.choice((7, 12)))}" if r.random() < 0.5 else r.text(_HEX, 40),
    "uuid": _uuid,
    "pod name": lambda r: f"{r.choice(_WORDS)}-{r.choice(_WORDS)}-{_safe_letters(r, 10)}-{_safe_letters(r, 5)}",
    "semantic version": lambda r: f"v{r.randrange(9)}.{r.randrange(99)}.0-rc.1+build.{r.randrange(9999)}",
    "ipv6": _ipv6,
    "mac": lambda r: ":".join(r.text(_HEX, 2) for _ in range(6)),
    "path": lambda r: f"/var/lib/kubelet/pods/{_uuid(r)}/volumes/kubernetes.io~{r.choice(_WORDS)}",
    "cgroup": lambda r: f"/kubepods.slice/kubepods-pod{r.text(_HEX, 32)}.slice/cri-containerd-{r.text(_HEX, 64)}.scope",
    "timestamp": _time,
    "number": lambda r: str(1_790_000_000_000 + r.randrange(10**9)),
    "label value": lambda r: f"{r.choice(_WORDS)}.{r.choice(_WORDS)}_{r.choice(_WORDS)}-{r.randrange(99)}",
    "hyphenated name": lambda r: "-".join(r.sample(_WORDS, 6)),
    "base32 id": lambda r: r.text("0123456789ABCDEFGHJKMNPQRSTVWXYZ", 26),
    "wrong card number": _wrong_card,
    "url": lambda r: f"https://{r.choice(_WORDS)}.example.com:8443/api/v{r.randrange(9)}?page={r.randrange(99)}",
    "cloud resource": lambda r: f"arn:aws:ec2:eu-west-1:{r.text(_DIGITS, 12)}:subnet/subnet-0{r.text(_HEX, 16)}",
    "command": lambda r: f"/usr/bin/{r.choice(_WORDS)} --port={r.randrange(9999)} -p {r.randrange(9999)} -c /etc/x",
}


def _harmless() -> list[tuple[str, str]]:
    source = _Source(21)
    return [(kind, make(source)) for kind, make in _HARMLESS.items() for _ in range(EACH)]


HARMLESS = _harmless()
"""Kind and value."""
