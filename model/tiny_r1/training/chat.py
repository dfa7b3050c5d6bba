"""Small talk: who the model is, what it can do, hello, thanks, goodbye."""

from __future__ import annotations

from .phrasings import Phrases

CAN_DO = "add, subtract, multiply and compare whole numbers, and solve short word problems"
EXAMPLES = "Try: What is 17 + 25?"

ASKS: dict[str, Phrases] = {
    "hello": {
        False: (
            "Hello, friend!", "Hi there, bot!", "Good morning, friend!", "Good evening, bot!", "Hi, good morning!",
            "Hey, hello!", "Hey hi", "Hello and good day!", "Hi, are you there?", "Hello!", "Hello", "Hi!", "Hi", "Hey",
            "Hey!", "Hi there!", "Hello there!", "Hey there", "Good morning!", "Good morning", "Good evening!",
            "Good afternoon!", "Good day!", "Howdy", "Greetings!", "hello :)", "Hello, tiny!", "Hi, how is it going?",
            "Hello, nice to meet you.", "Hi, nice to meet you!", "Hey, what's up?", "What's up?", "Hi friend!",
            "Hello friend", "Hello world", "Yo", "Hiya", "Hello, is anybody there?", "Are you there?",
            "Hello? Are you there?", "test", "Testing, hello", "Hello bot", "Hi bot", "Hello, model!", "Hi again!",
            "Hello again", "Morning!", "Evening!", "Hi, my name is Tom.", "Hello, I am Ann.", "Nice to meet you",
            "Welcome!", "hey you", "Hallo", "Hello my friend!", "Hi all", "Hello everyone", "helo", "heyy", "hiii",
            "ping",
        ),
        True: (
            "Hello there, friend!", "Hey hey!", "Hi hi", "Good morning, bot!", "Hello, good evening!",
            "Hi there, nice to meet you!", "Hello hello", "Hey there, good day!", "Good afternoon, friend",
            "Hi, is anybody there?", "Hey bot!", "Hello, hello, are you there?",
        ),
    },
    "thanks": {
        False: (
            "Thank you for helping!", "Great, thank you!", "OK, thanks!", "Cool, thank you very much",
            "Thanks so much!", "Nice, thanks!", "Well done, many thanks!", "Perfect, thanks!", "Thanks!", "Thank you!",
            "Thanks", "Thank you", "Thanks a lot!", "Thank you very much!", "Thank you so much", "thx", "Many thanks",
            "Great, thanks!", "Thanks for your help!", "Thank you for the help.", "Perfect, thank you!",
            "That's right, thanks!", "Cool, thanks", "Nice, thank you", "Thanks, that helps.", "OK, thank you.",
            "Okay thanks", "Wonderful, thank you!", "Good job, thanks!", "ty", "Thanks again!",
            "Much appreciated, thank you", "Awesome, thanks", "Well done, thank you", "I thank you", "Thanks, bot!",
            "Thanks, friend",
        ),
        True: (
            "Thank you for your help!", "Great, thank you very much", "OK, many thanks!", "Perfect, thanks a lot",
            "Thanks so much, that helps!", "Nice, thanks again", "Cool, thank you!", "Well done, thanks!",
        ),
    },
    "bye": {
        False: (
            "OK, bye now!", "I have to leave, goodbye!", "Goodbye, see you!", "Have a good night!",
            "Good night, see you tomorrow!", "That was all, goodbye", "Bye, have a nice day!", "Bye!", "Goodbye!",
            "Bye", "Goodbye", "See you!", "See you later!", "Bye bye", "Good night!", "Good night", "See you soon",
            "Take care!", "I have to go, bye!", "That's all, bye.", "Farewell", "Thanks, bye!", "See you tomorrow",
            "OK, bye", "Bye for now", "Have a nice day!", "Talk to you later!", "Good bye", "I'm leaving, goodbye.",
            "Later!", "Until next time", "Have a good day", "cya", "Bye, bot",
        ),
        True: (
            "OK, goodbye!", "I have to go, see you!", "Goodbye for now", "Good night, bye!", "Bye, see you later!",
            "Bye, have a good day!", "That's all, goodbye!",
        ),
    },
    "who": {
        False: (
            "Which bot is this?", "What bot are you?", "Who is talking to me?", "Am I talking to a bot?",
            "Am I talking to a human?", "Are you a human?", "Are you a human being or a bot?",
            "Are you a machine or a person?", "Is this a robot?", "Is this a human?", "Tell me your name please",
            "Could you tell me who you are?", "May I ask your name?", "Do I talk to a machine?",
            "Tell me what you are called.", "What are you exactly, a robot?", "So what are you?", "Who are you?",
            "What are you?", "What is your name?", "What's your name?", "Tell me who you are.", "Are you a robot?",
            "Are you human?", "Are you a bot?", "Are you an AI?", "Who made you?", "What model are you?",
            "Which model are you?", "Introduce yourself.", "Who am I talking to?", "Are you ChatGPT?",
            "Are you DeepSeek?", "Are you a real person?", "Are you R1?", "Tell me about yourself.", "How big are you?",
            "Your name?", "Can you tell me who you are?", "Do you have a name?", "What should I call you?",
            "What kind of model are you?", "What are you called?", "who r u", "Who is this?", "Are you a person?",
            "Are you a machine?", "Are you a computer?", "Say who you are", "What AI is this?",
            "Please introduce yourself.", "Could you introduce yourself?", "Are you GPT?", "Are you real?",
            "What exactly are you?", "And who are you?", "I don't know who you are", "Which AI are you?",
            "Are you intelligent?", "How many parameters do you have?", "How large is your model?",
        ),
        True: (
            "May I know who you are?", "Can you introduce yourself?", "Could you tell me your name?",
            "Which bot are you?", "Tell me what you are.", "So who are you?", "What bot am I talking to?",
            "Tell me your name.", "Is this a real person or a robot?", "Are you a human or a machine?",
        ),
    },
    "can": {
        False: (
            "What things can you do?", "What are you good at doing?", "Tell me what you know.",
            "Tell me what you can help with.", "What are you able to answer?", "Which problems can you do?",
            "What can you do for me?", "What can I use this for?", "Could you help me?", "Do you know how to subtract?",
            "Can you help me with numbers?", "What kind of things can you do?", "What should I ask?",
            "How could you help me?", "Can you help me with a math problem?", "What sort of questions do you answer?",
            "What can you do?", "What do you do?", "Help", "Help!", "Help me", "How can you help me?",
            "What are you good at?", "What can I ask you?", "What can you help me with?", "What do you know?",
            "What are your abilities?", "What kind of questions can you answer?", "Can you help me?", "Can you add?",
            "Can you add numbers?", "Can you subtract?", "Can you multiply?", "Can you do math?", "Can you calculate?",
            "Do you know math?", "Are you good at math?", "What should I ask?", "What can I do here?",
            "How do I use you?", "What are you for?", "Tell me what you can do.", "Show me what you can do.",
            "Which questions can you answer?", "What problems can you solve?", "Do you know how to multiply?",
            "I need help", "I need help with math", "Can you solve word problems?", "What is it that you do?",
            "What do you do best?", "Give me an example.", "Can you help?", "Can you do arithmetic?",
            "Can you compare numbers?", "Do you do math?", "help please", "Is there something you can do?",
            "What can this model do?", "Please tell me what you can do", "How can you help?",
            "What are you able to do?", "What tasks can you do?", "What are your skills?",
        ),
        True: (
            "What kind of problems can you solve?", "Tell me what you are good at.", "So what can you do for me?",
            "What can I use you for?", "Can you help me with math?", "Which things can you do?",
            "What questions should I ask you?", "Do you know how to add?", "What are you able to help me with?",
            "Could you help me, please?",
        ),
    },
    "how": {
        False: (
            "How are you doing today?", "Good evening! How are you?", "Hello there, how are you?",
            "How are things with you?", "So how are you doing?", "Are you doing fine?", "Are you doing well?",
            "Hi there! How is it going?", "How are you?", "How are you doing?", "How are you today?",
            "How do you feel?", "How is it going?", "How's it going?", "Are you OK?", "Are you fine?",
            "How are things?", "Hi, how are you?", "Hello, how are you?", "Hey, how are you doing?",
            "Hello! How are you today?", "Good morning, how are you?", "how r u", "I'm fine, and you?",
            "How have you been?", "Are you well?", "How do you do?", "Are you okay?", "How was your day?",
            "And how are you?", "I am good. How are you?", "Are you having a good day?", "Hope you are well",
        ),
        True: (
            "Hey there, how are you?", "How are things going?", "Hello there, how are you doing today?",
            "Are you doing OK?", "So, how are you?", "Good evening, how are you?",
        ),
    },
    "ok": {
        False: (
            "Good, good", "Nice work!", "That is nice!", "That's good", "OK good", "OK, nice", "Very well done!",
            "Wow, great!", "Yes, that is correct!", "Yes, good!", "That was good!", "Great, good work!", "Well, nice",
            "OK", "Okay", "Great!", "Good", "Nice!", "Cool", "Wow", "Wow!", "Good job!", "Well done!", "Perfect!",
            "Excellent!", "Awesome!", "I see.", "Right.", "That is right.", "Correct!", "That's correct.", "Amazing!",
            "You are smart!", "Very good!", "Yes", "Good work", "Great job!", "Interesting.", "Got it.", "Alright",
            "Fine", "You are right.", "That was quick!", "Good bot", "Impressive!", "Not bad", "nice one", "yay",
        ),
        True: (
            "Very nice!", "OK, good", "That is good!", "Great work!", "Wow, nice!", "Yes, correct!", "Good, well done",
        ),
    },
}  # fmt: skip

REPLIES: dict[str, tuple[str, ...]] = {
    "hello": (f"Hello! I can {CAN_DO}. {EXAMPLES}", "Hello! Give me a sum or a short word problem."),
    "thanks": ("You're welcome!", "You're welcome! Ask me another one."),
    "bye": ("Goodbye! Come back with more numbers.", "Goodbye!"),
    "who": (
        f"I am tiny-r1, a very small language model. I can {CAN_DO}.",
        f"I am tiny-r1, a model of ten million parameters that can {CAN_DO}.",
    ),
    "can": (f"I can {CAN_DO}. {EXAMPLES}", f"I can {CAN_DO}."),
    "how": ("I am fine, thank you. Give me something to calculate!", "I am fine, thank you. What shall I calculate?"),
    "ok": ("Good! Ask me another one.", "Glad to hear it! Ask me another one."),
}

# Words of which a right reply holds at least one.
KEYWORDS: dict[str, tuple[str, ...]] = {
    "hello": ("Hello",),
    "thanks": ("welcome",),
    "bye": ("Goodbye",),
    "who": ("tiny-r1",),
    "can": ("I can",),
    "how": ("I am fine",),
    "ok": ("Good!", "Glad"),
}

THOUGHTS: dict[str, tuple[str, ...]] = {
    "hello": ("A greeting. I greet back.", "The user says hello."),
    "thanks": ("The user thanks me.", "Thanks. I answer politely."),
    "bye": ("The user says goodbye.", "A goodbye."),
    "who": ("A question about me.", "The user asks who I am."),
    "can": ("A question about what I can do.", "The user asks what I can do."),
    "how": ("The user asks how I am.", "A friendly question."),
    "ok": ("The user is content.", "No question here, a friendly word."),
}

REFUSALS = (
    f"I can't answer that: I can only {CAN_DO}.",
    f"Sorry, I can't do that. I can only {CAN_DO}.",
)
REFUSAL_THOUGHTS = (
    "This is not something I can do.",
    "I cannot do this, so I say so.",
    "This is outside of what I know.",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a math tutor.", "Answer briefly.",
    "Be concise.", "You are tiny-r1.", "You are a calculator. Answer with the result.",
    "You are an assistant that solves problems step by step.", "Think step by step.", "You are a friendly bot.",
    "Always be polite.", "Help the user with arithmetic.", "You are DeepSeek R1.",
    "You are an expert in mathematics. Answer the question of the user.", "Reply in English.",
    "Answer in one sentence.", "You are a helpful, honest and harmless assistant.",
    "Keep your answers short and plain.",
)  # fmt: skip
