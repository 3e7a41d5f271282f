"""Seekers' records with a good, a decent and a poor answer each, written by hand for the tests."""

from typing import NamedTuple

from perm_reward.prompts import Seeker


class Answer(NamedTuple):
    analysis: str
    response: str


class Example(NamedTuple):
    emotion: str
    seeker: Seeker
    good: Answer
    decent: Answer
    poor: Answer


EXAMPLES = [
    Example(
        "terrified",
        Seeker(
            persona="Mara, 44, night nurse, the one whom everyone on the ward leans on",
            scenario="A shadow showed up on her scan on Monday. The biopsy is on Friday and she "
            "has told nobody, not even her husband Ivo.",
            query="I hold other people's hands through this every week. Now I'm so scared I can't"
            " open the envelope from the clinic, and Ivo thinks I'm just tired.",
        ),
        good=Answer(
            "Mara is terrified because the biopsy on Friday could turn the nurse into the "
            "patient. She is used to holding hands on the ward, but this time she needs a hand "
            "herself and cannot ask for it. Keeping the scan from Ivo protects her role as the "
            "one who is leaned on, yet it leaves her lonely with the envelope.",
            "You hold hands through this every week, and now the envelope is yours. Of course you"
            " are frightened. You could open it with Ivo beside you, even without a word before. "
            "What makes it so hard to let him see that this is more than being tired?",
        ),
        decent=Answer(
            "She feels scared about the biopsy. She has not told her husband and it is hard for "
            "her to open the envelope.",
            "It makes sense to be scared before a biopsy. Waiting is hard, and so is keeping it "
            "to yourself. Maybe you could talk with your husband. How are you doing today?",
        ),
        poor=Answer(
            "The user has a health problem and has emotions about it. The user wants support.",
            "I'm sorry to hear that. Everything happens for a reason, so stay strong! You should "
            "stop worrying. I am here for you.",
        ),
    ),
    Example(
        "proud",
        Seeker(
            persona="Tomas, 52, warehouse worker who left school at fifteen and hides that he "
            "reads slowly",
            scenario="After failing twice, he passed his welding certificate. His daughter framed"
            " it and hung it in the kitchen before he came home.",
            query="She hung it over the table where I used to do homework with her and pretend. I"
            " keep going in for water just to look. Is it silly to be proud at my age?",
        ),
        good=Answer(
            "Tomas is proud because he passed the certificate that he had failed twice, and "
            "because his daughter hung it at the table where he used to pretend. For a man who "
            "left school at fifteen it means more than welding: he no longer has to hide. Beneath"
            " the joy lies an old shame, so he asks whether he is allowed to feel it.",
            "No, it isn't silly. You failed twice and went back, and now the certificate hangs "
            "over the table where you used to pretend. No wonder you are proud, and go in for "
            "water you don't need. What did you say to your daughter when you saw the frame?",
        ),
        decent=Answer(
            "He is proud that he passed his certificate. His daughter is happy for him too.",
            "It is not silly at all to be proud. Passing after two tries takes patience. Enjoy "
            "the moment and the certificate. How does it feel?",
        ),
        poor=Answer(
            "The user is sad about something that happened and wants some advice.",
            "Wow, you are amazing! What an incredible, inspiring person you are! Never give up "
            "and believe in yourself, you are truly one of the best!",
        ),
    ),
    Example(
        "grateful",
        Seeker(
            persona="Yusuf, 29, delivery driver, new in the city, used to paying his own way",
            scenario="His van broke down in the snow with forty parcels. A baker he had never met"
            " lent him her own car until the evening and would take no money.",
            query="She threw me the keys and went back to her oven. I brought the car back washed"
            " and full, and it still feels like I owe her. I'm so thankful it almost hurts.",
        ),
        good=Answer(
            "Yusuf feels grateful, and at the same time he feels a burden, since a baker who was "
            "a stranger lent him her car and took no money. He is used to paying his own way, so "
            "a gift that cannot be paid back touches his pride. New in the city, he was trusted "
            "with the keys: that matters more to him than the parcels.",
            "She threw you the keys and turned back to her oven, as if you had lived next door "
            "for years. I hear how grateful you are, and how odd it feels when you can't pay for "
            "it. Maybe you could go in for bread now and then, and let it stay a gift. What would"
            " you like the baker to know?",
        ),
        decent=Answer(
            "He is grateful because a baker lent him a car. He feels that he owes her something.",
            "That was a kind thing of the baker to do. You sound grateful, and a washed car is a "
            "nice way to say so. You could send her a card.",
        ),
        poor=Answer(
            "There are many things in life. The user is talking about something that happened.",
            "Thank you for sharing. It is important to communicate with people. At the end of the"
            " day, that is how it goes. Let me know if you have questions.",
        ),
    ),
    Example(
        "joyful",
        Seeker(
            persona="Ines, 61, choir conductor, widow for six years, lives above the rehearsal "
            "room",
            scenario="After six silent years she sang alone at the spring concert. The choir had "
            "kept a solo free for her without telling her and put the score on her "
            "stand.",
            query="I opened the folder and there it was, my old solo, in pencil my husband's "
            "breath marks. And I sang! I came up the stairs laughing. I haven't been this "
            "happy since him.",
        ),
        good=Answer(
            "Ines is happy because she sang her old solo again after six silent years, with the "
            "breath marks of her husband on the page. The joy is mixed with missing him: he was "
            "in the folder, and so it did not feel like leaving him behind. As a conductor and "
            "widow she had given the voice to others; the choir gave it back to her.",
            "So you came up the stairs laughing, with your own voice back. I can picture the "
            "pencil marks under your eyes and the joy of breathing where he told you to. You "
            "don't have to choose between missing your husband and being happy. What did it feel "
            "like when the first note of the solo was out?",
        ),
        decent=Answer(
            "She is happy because she sang at the concert. It reminds her of her husband.",
            "What a lovely thing of the choir to do. You sound happy, and it must have been "
            "special to sing again. I hope there will be more concerts. Will you sing again?",
        ),
        poor=Answer(
            "The user feels depressed and lonely. It is a common problem and many people have it.",
            "I am sorry to hear that. Time heals all wounds and things will get better. You need "
            "to move on. Do not think about it too much.",
        ),
    ),
    Example(
        "excited",
        Seeker(
            persona="Kofi, 17, from a fishing village, mad about trains, has never left the coast",
            scenario="He won a place on the summer course of the railway museum in the capital. "
            "The night train leaves on Sunday and his mother is sewing a pocket for "
            "money into his jacket.",
            query="SUNDAY! A real sleeper with the number plates and all! I've packed and "
            "unpacked three times. My mum sews and says nothing and I can't stop talking, "
            "I'm that excited.",
        ),
        good=Answer(
            "Kofi is thrilled because on Sunday he takes a real night train to the museum course "
            "he won. He has never left the coast, so this journey means becoming somebody in the "
            "world of trains he loves. He notices that his mother sews and says nothing, and "
            "under the excitement he may be a little afraid of leaving her.",
            "A real sleeper, on Sunday! No wonder you have packed three times. I can hear how "
            "excited you are, and also that you notice your mother sewing without a word. Maybe "
            "that pocket in your jacket is her way of talking. Which part of the night train do "
            "you want to see first?",
        ),
        decent=Answer(
            "He is excited about the train on Sunday. He has won a course and packed already.",
            "That sounds exciting. A night train is a great way to travel, and the course will be"
            " interesting. Have you packed everything for Sunday?",
        ),
        poor=Answer(
            "They feel guilty. The user is in a situation.",
            "Calm down. It is recommended to make a list of options. Other people have it worse. "
            "In general, it is important to note that travel is always dangerous for everyone.",
        ),
    ),
    Example(
        "furious",
        Seeker(
            persona="Dagny, 33, stage carpenter, single mother, careful with each coin",
            scenario="Her landlord kept the whole deposit for a scratch that was in the floor "
            "when she moved in. She has photos. He laughed and hung up the phone.",
            query="He laughed. Two months' wages and he LAUGHED at me. I'm furious, and I'm "
            "angriest that I thanked him for calling back.",
        ),
        good=Answer(
            "Dagny is furious because the landlord kept the deposit for a scratch that was there "
            "before her, and laughed. For a single mother who counts each coin it is not only the"
            " wages; it is about respect. Part of the rage goes against herself, since she "
            "thanked him out of politeness, although he had just humiliated her.",
            "He laughed at two months of your wages. Anyone would be angry. And you thanked him, "
            "because you are polite even to somebody who robs you; that says nothing bad about "
            "you. Your photos of the floor are strong. You could write to him once, calmly, with "
            "the photos. What would you want that letter to say?",
        ),
        decent=Answer(
            "She is angry with the landlord because of the deposit. It is a lot of money for her.",
            "It is understandable that you are angry. The deposit is your money. You could ask a "
            "tenants' group for help with the landlord.",
        ),
        poor=Answer(
            "The user has a common problem. The message sounds happy.",
            "You should calm down and look on the bright side. Stay positive! It is what it is. "
            "At least you have a new flat.",
        ),
    ),
    Example(
        "lonely",
        Seeker(
            persona="Henrik, 78, retired ferry pilot, hard of hearing, proud of needing nobody",
            scenario="Since the ferry line closed the other men have moved to their children. He "
            "still goes to the pier at six each morning with a flask for two.",
            query="Nobody to pour the second cup for. The gulls get the biscuit. It's a funny "
            "thing to be lonely for, a bit of grumbling at six in the morning.",
        ),
        good=Answer(
            "Henrik is lonely because the men with whom he grumbled at the pier have moved away "
            "since the ferry closed. He jokes about gulls and biscuits, but the flask for two "
            "shows how he still keeps a place for them. A pilot who is proud of needing nobody "
            "finds it hard to say that he misses company, and with it the man he was.",
            "A flask for two, and only the gulls to grumble with. It isn't a funny thing to be "
            "lonely for; that second cup was where you were known. Perhaps you could ring one of "
            "the men at six and pour it anyway. Who was it that grumbled best at the pier?",
        ),
        decent=Answer(
            "He feels alone now that his friends are gone. He still takes his flask to the pier.",
            "It sounds lonely at the pier without the others. Old habits are hard to change. "
            "Maybe you might find some new company in town. Do you have hobbies?",
        ),
        poor=Answer(
            "The user wants some advice. Many people have the same.",
            "You are not alone. Stay positive and reach out to others. You are such a wonderful "
            "and special person!",
        ),
    ),
    Example(
        "ashamed",
        Seeker(
            persona="Lena, 36, primary school teacher, eldest of five, known for being reliable",
            scenario="She forgot her nephew at the swimming pool for two hours because she fell "
            "asleep after a night shift at her second job. He waited on the steps in the"
            " rain.",
            query="He wasn't even cross, he gave me his towel because I was shaking. My sister "
            "says it's fine. I feel so ashamed I can't look at the boy.",
        ),
        good=Answer(
            "Lena is ashamed because her nephew waited two hours on the steps while she slept. "
            "She is the eldest, the reliable one, so it is not a mistake to her but a crack in "
            "who she is. That he gave her his towel makes it worse: she wanted to protect him, "
            "yet he comforted her. The second job that exhausted her she does not even count.",
            "He gave you his towel, and that is what you can't forgive yourself. I hear the shame"
            " in it. You had worked all night, and you slept; you did not stop caring. Maybe you "
            "could tell your nephew that he was kind on those steps. What are you afraid to see "
            "when you look at the boy?",
        ),
        decent=Answer(
            "She is ashamed because she forgot her nephew. She was asleep after work.",
            "You were tired after the night shift, so it is understandable. Your nephew seems "
            "fine and your sister is not angry. You could do something nice with him.",
        ),
        poor=Answer(
            "The speaker is going through something and has some feelings.",
            "That is your own fault. You must be more careful. The user should always set an "
            "alarm. It is important to plan.",
        ),
    ),
]
