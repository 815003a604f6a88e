"""A built-in stand-in for AG News: short news-like documents written by a grammar, the same on every machine.

The phrases are our own and every person, club, company and event in them is invented. Random numbers come from
`random.Random.random`, whose sequence Python keeps for a given seed.
"""

from __future__ import annotations

import random
import re

# One rule is `name: option | option ...`; an indented line goes on. {name} expands to one option of that name,
# {NAME} to one in capitals; {name=x} also remembers the expansion as x, which {x} repeats.
_GRAMMAR_TEXT = r"""
start: {world} | {sports} | {business} | {science}
# Words that all use
day: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday
month: January | February | March | April | June | July | August | September | October | November
first:
    Anna | Bela | Carlo | Dina | Erik | Fatima | Georg | Hana | Ivan | Joana | Karim | Lena | Milan | Nora | Oskar |
    Petra | Quinn | Rosa | Samir | Tessa | Umar | Vera | Walter | Xenia | Yusuf | Zora
last:
    Abril | Berger | Castel | Dorn | Eklund | Ferro | Grau | Holm | Ibarra | Jansen | Kovac | Lindt | Marek |
    Novak | Olsen | Prado | Quist | Rossi | Stern | Tamm | Urban | Voss | Weiss | Xavier | Yilmaz | Zeller
place:
    Avelin | Borland | Cresta | Dunmore | Eastport | Farrow | Galdia | Harvik | Istra | Jorven | Kestrel Bay |
    Lorne | Marland | Norvia | Ostria | Pellia | Quarry Point | Ravenna Falls | Solana | Tarn | Upland | Valdora |
    Westmark | Yarrow | Zelia
agency: Northern Wire | Press Union | City Desk | Morning Post | Daily Ledger | Harbour Times
said: said | told reporters | said in a statement | announced | confirmed | said on {day}
source: officials | a spokesman | a spokeswoman | two people close to the talks | the ministry | local media
small: two | three | four | five | six | seven | eight | nine | ten | a dozen
number: {digit} | 1{any} | 2{any} | 3{any} | {digit}{any}0 | {digit},{any}00
digit: 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9
any: 0 | {digit} | {digit}
dateline: {PLACE} ({agency}) - | {PLACE}, {month} {digit} ({agency}) - | {agency} - | |

# World
world:
    {place=p} {agree} {deal} {dateline} {lead_world} {more_world} |
    {place=p} votes after {event} {dateline} {lead_vote} {more_world} |
    {event=e} hits {place=p} {dateline} {lead_storm} {more_storm}
agree: signs | rejects | delays | welcomes | backs | weighs
deal: border treaty | fishing pact | trade accord | peace plan | water agreement | prisoner exchange
event: storm | flood | earthquake | strike | drought | power cut | heat wave
lead_world:
    The government of {p} {said} that it would {decide} the {deal} with {place} before the end of {month}. |
    Ministers from {p} and {place} met for {small} hours on {day} to {decide} a {deal}, {source} said. |
    Talks between {p} and {place} ended without a {deal} on {day}, and {source} blamed the other side.
decide: review | accept | put off | renew | discuss | suspend
lead_vote:
    Voters in {p} went to the polls on {day} to choose a new parliament, {small} months after the {event}. |
    President {last=n} won {number} seats in {p}, but needs the help of {small} smaller parties, {source} said.
lead_storm:
    A {e} in the north of {p} left at least {number} people without shelter, {source} said on {day}. |
    Rescue teams reached {small} villages near {p} on {day}, a week after the {e} began.
more_world:
    "We {want} a fair result," {first} {last} {said}. | It was the {ordinal} such meeting since {month}. |
    Thousands marched in the capital; the police counted {number}. | The vote is due on {day}.
more_storm:
    Schools will stay closed until {day}. | The damage may cost ${number} million, {source} said. |
    "We have never seen a {e} like this," said {first} {last}, who has lived there for {small} years.
want: want | need | expect | will not give up until we have
ordinal: first | second | third | fourth | fifth | last

# Sports
sports:
    {team=t} {beat} {team=u} {score} {dateline} {lead_sport} {more_sport} |
    {last=n} leads {team=t} to {round} {dateline} {lead_hero} {more_sport}
team:
    Avelin Rovers | Borland Bears | Cresta Kings | Dunmore City | Eastport Eagles | Farrow Foxes | Harvik Hawks |
    Jorven United | Lorne Lions | Norvia Knights | Tarn Tigers | Upland Wolves | Zelia Athletic
beat: beat | edge | rout | hold | stun | upset | sweep past
score: {digit}-{digit} | {digit}-0 | {digit}{any}-{digit}{any} | in overtime
round: the final | the semifinals | the quarterfinals | the cup | the playoffs | a draw
lead_sport:
    {first} {last=n} scored {small} times as the {t} came from behind against the {u} on {day}. |
    The {t} won their {ordinal} game in a row on {day}, and the {u} have lost {small} of their last {number}. |
    A late {play} by {first} {last=n} gave the {t} the game in front of {number} fans in {place}.
play: goal | penalty | free kick | home run | jump shot | touchdown | save
lead_hero:
    {first} {n} made {small} {play}s on {day} and sent the {t} to {round}, in a match that lasted {number} minutes. |
    {n}, who missed {small} weeks with a knee injury, came back with a {play} as the {t} reached {round}.
more_sport:
    "It's a great night for us," {n} said. | Coach {last} called it the best {play} of the season. |
    They meet the {team} next {day}. | The {team} are still top of the table with {number} points.

# Business
business:
    {firm=f} {result} {dateline} {lead_firm} {more_firm} | {goods} prices {go} {dateline} {lead_price} {more_firm}
firm:
    Alto Foods | Brightline Energy | Corvus Bank | Delta Motors | Ember Telecom | Fjord Shipping | Glade Stores |
    Hexa Chemicals | Juniper Air | Keystone Steel | Quantum Media | Vega Software
result:
    profit {move} | to buy {firm} | cuts {number} jobs | names new chief | raises forecast |
    to open plant in {place}
move: rises {number} percent | falls {number} percent | jumps | slips | beats forecasts | misses forecasts
goods: Oil | Gold | Wheat | Copper | Coffee | House | Gas | Steel
lead_firm:
    {f} said on {day} that its quarterly profit {move} to ${number} million, helped by sales in {place}. |
    Shares of {f} {moved} after the company said it would {plan} in {month}. |
    {f} will pay ${number} million for {firm}, {source} said, in its {ordinal} deal this year.
go: rise | fall | jump | slip | hold steady | swing
moved: rose {digit}.{digit} percent | fell {digit}.{digit} percent | hardly moved | gained {digit}{any} cents
plan: close {small} plants | hire {number} workers | split in two | repay its debt | sell its {place} unit
lead_price:
    Prices {moved} on {day} to ${number} a {unit} as traders worried about the {event} in {place}. |
    The cost of a {unit} {moved} in {month}, the {ordinal} change in a row, the central bank of {place} said.
unit: barrel | ton | pound | share | kilo
more_firm:
    Analysts had expected ${number} million. | The shares {moved} on the {place} exchange. |
    "Demand is {state}," chief executive {first} {last} {said}. | The company employs {number} people in {place}.
state: strong | weak | better than we hoped | slow but steady | hard to predict

# Science and technology
science:
    {group=g} {find} {dateline} {lead_science} {more_science} |
    {firm=f} unveils {gadget=d} {dateline} {lead_gadget} {more_gadget}
group: Scientists | Engineers | Astronomers | Students | Researchers in {place}
find: find {thing} on {body} | test {gadget} | map {thing} | warn of {event} | solve puzzle of {thing}
thing: ice | old water | new bacteria | giant fossils | a rare mineral | deep caves | hidden craters
body: Mars | the Moon | Titan | a comet | the sea floor | Europa
lead_science:
    {g} {said} on {day} that {thing} may be common on {body}, a finding that took {small} years. |
    A probe that left {place} in {month} has sent back {number} pictures of {body}, {source} said. |
    The study of {thing}, led by {first} {last}, used data from {number} sensors.
more_science:
    "It was a surprise," {last} said. | The results appear in this week's journal. |
    A {ordinal} mission is planned for {month}. | Others asked for more proof.
gadget: music player | web browser | search tool | phone | laptop | video game | e-mail filter | robot
lead_gadget:
    {f} showed a {d} on {day} that weighs {number} grams and costs ${number}, and said it would ship in {month}. |
    A flaw in the {d} of {f} could let attackers read files, {source} said; a fix is due on {day}.
more_gadget:
    Rivals {firm} and {firm} sell similar products. | About {number} users have tried the {d} so far. |
    "People want a simple {d}," said {first} {last} of {f}.
n: {last}
"""

# Text, then name and label of a slot (both empty after the last text).
_Option = list[tuple[str, str, str]]


def _parse(text: str) -> dict[str, list[_Option]]:
    rules = re.findall(r"^(\w+):((?:.*\n)(?: .*\n)*)", text, re.MULTILINE)
    return {name: [_option(option.strip()) for option in re.sub(r"\n +", " ", body).split("|")] for name, body in rules}


def _option(text: str) -> _Option:
    parts = re.split(r"\{(\w+)=?(\w?)\}", text) + ["", ""]
    return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))


_GRAMMAR = _parse(_GRAMMAR_TEXT)


def write_news(count: int = 10_000, *, seed: int = 0) -> list[str]:
    """`count` documents of about 200 characters, 72 distinct ones in all; document i is the same for every count."""
    return [_document(random.Random(seed * 1_000_003 + i)) for i in range(count)]


def _document(rng: random.Random) -> str:
    text = re.sub("  +", " ", _expand("start", rng, {}))
    return text[0].upper() + text[1:]


def _expand(name: str, rng: random.Random, known: dict[str, str]) -> str:
    """One option of a rule, with its slots filled; labels are entered in `known` and win over rules."""
    if name in known:
        return known[name]
    options = _GRAMMAR[name.lower()]
    text = ""
    for literal, slot, label in options[int(rng.random() * len(options))]:
        filled = _expand(slot, rng, known) if slot else ""
        if label:
            known[label] = filled
        text += literal + filled
    return text.upper() if name.isupper() else text
