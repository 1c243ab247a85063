"""Methods of the cache with settings with which they have much to do in a few hundred tokens."""

from __future__ import annotations

from tests.kv.slow_reference import KNOWN

from tightfit.catalog import all_techniques
from tightfit.errors import UsageError
from tightfit.kv.compose import compose

SETTINGS = {
    "window": "window(keep=60)",
    "h2o": "h2o(keep=72,recent=0.25)",
    "snapkv": "snapkv(keep=70,window=12)",
    "d2o": "d2o(keep=70,recent=0.25)",
    "kvmerger": "kvmerger(keep=70)",
    "elastic": "elastic(keep=70,offset=12)",
    "ems": "ems(keep=70,window=12,threshold=0.2)",
    "lococo": "lococo(keep=70,slots=24,window=12,steps=2)",
    "less": "less(rank=4,hidden=16)",
    "tova": "tova(keep=70)",
    "scissorhands": "scissorhands(keep=70,recent=16,window=40)",
    "corm": "corm(keep=70,window=24)",
    "morphkv": "morphkv(keep=70,window=24)",
    "locret": "locret(keep=70,recent=12,hidden=16)",
    "scope": "scope(keep=70,output=30,recent=12)",
    "tim": "tim(open=#3,conclude=#17,close=#40,keep=200)",
    "anchor": "anchor(at=#3,keep=200)",
    "mikv": "mikv(keep=70,recent=0.25)",
    "zipcache": "zipcache(keep=0.4,recent=16,window=12)",
    "aqua": "aqua(keep=20,bits=4,first=8)",
    "cq": "cq(coupled=2,recent=16)",
    "gear": "gear(bits=4,recent=16)",
    "int8": "int8(recent=16)",
    "int4": "int4(recent=16)",
    "int2": "int2(recent=16)",
    "think": "think(recent=16,window=8)",
    "quest": "quest(tokens=32,full=1)",
    "a2ats": "a2ats(tokens=48,full=1,codes=32,distance=64,window=16,sinks=2)",
    "alisa": "alisa(tokens=48,full=1,steps=4)",
    "clusterkv": "clusterkv(tokens=96,full=2,size=4,every=32,sinks=4)",
    "squeezed": "squeezed(tokens=32,full=1,size=8,prefix=90)",
    "recycled": "recycled(tokens=32,full=1,stride=6)",
    "selfspan": "selfspan(span=#3,use=#17,done=#40,tokens=128)",
    "host": "host(resident=32)",
    "duo": "duo(recent=44,retrieval=0.5,sample=400,steps=3)",
    "lserve": "lserve(recent=44,tokens=32,size=8,every=3,sample=400,steps=3)",
    "razor": "razor(recent=44,echo=0.2,induction=0.2,tokens=32)",
    "lighttransfer": "lighttransfer(recent=44,window=12)",
    "hgca": "hgca(keep=64)",
    "headinfer": "headinfer(resident=0)",
    "tailor": "tailor(recent=16,tokens=32,resident=0,bits=8,threshold=0.7)",
    "specache": "specache(tokens=32,ahead=32,resident=0,bits=8)",
    "matryoshka": "matryoshka(share=0.75,steps=3)",
    "gqa": "gqa",
    "pod": "pod(keep=64,sinks=4,similar=0.4)",
    "cskv": "cskv(keep=60,keys=0.6,values=0.6)",
}
# Methods that do not go with these, and say why. All others do.
REFUSED: dict[str, set[str]] = {
    "aqua": {"int4", "int8"},
    "cq": {"int4", "int8"},
    "gear": {"int4", "int8"},
    "zipcache": {"int4", "int8"},
    "cskv": {"int4", "int8"},
    "headinfer": {"host"},
    "hgca": {"host"},
    "tailor": {"host", "int4", "int8"},
    "specache": {"host"},
}
METHODS = [SETTINGS.get(entry.name, entry.name) for entry in all_techniques() if entry.seam == "kv"]
DEFINED = [spec for spec in METHODS if spec.partition("(")[0] in KNOWN]  # those that the slow reference defines
OTHERS = [spec for spec in METHODS if spec not in DEFINED]
OTHERS.append("less(rank=4,hidden=16)+h2o(keep=72,recent=0.25)")  # alone it has nothing to do


def refused(*specs: str) -> bool:
    """Whether methods do not go together."""
    try:
        compose("+".join(specs))
    except UsageError:
        return True
    return False
