"""Documents labelled by hand, in nine locales: (what is wrong, or "", locale, text). Written for this test; some are laid out by code."""
# ruff: noqa: E501

CLEAN: dict[str, list[str]] = {
    "en": [
        "The harbour was built in the seventeenth century, when ships from the north brought salt and timber. Today most of the old storehouses are homes, and only two fishing boats still leave before dawn. Visitors come for the narrow lanes, the small museum of nets and sails, and a bakery that has used the same oven for four generations of the family.",
        "To change a bicycle tyre, first let the remaining air out and loosen the bead with two levers. Pull the tube out, look for the hole under water, and roughen the rubber around it. Spread a thin layer of glue, wait until it is dry to the touch, then press the patch on firmly. Before you put the tube back, feel inside the tyre for the thorn that caused the trouble.",
        "The committee met on 12 March 2018 and discussed the budget for the next three years. Revenue had grown by 4.5 %, mostly because of new members, while the costs of the building stayed the same. It was agreed that 20,000 euros should be kept for repairs of the roof. The treasurer will report again in autumn, once the offers of at least three firms have arrived.",
    ],
    "de_DE": [
        "Der Bäcker am Marktplatz öffnet seit vierzig Jahren jeden Morgen um sechs Uhr. Sein Sauerteig ruht über Nacht in hölzernen Trögen, und der Duft zieht durch die ganze Straße. Als im Winter der Ofen ausfiel, brachten die Nachbarn ihm Brennholz, damit er den alten Steinofen im Hof anheizen konnte. Seitdem gibt es jeden Samstag Brot wie zu Großvaters Zeiten, und die Schlange reicht bis zur Kirche.",
        "Vor der Installation sollten Sie alle wichtigen Dateien sichern. Das Programm ändert die Aufteilung der Festplatte, und ein Stromausfall zur falschen Zeit kann Daten zerstören. Prüfen Sie danach, ob die Sicherung lesbar ist, denn eine Kopie, die niemand getestet hat, ist keine. Erst wenn das geschehen ist, legen Sie den Datenträger ein, starten den Rechner neu und folgen den Hinweisen auf dem Bildschirm.",
        "Moore speichern mehr Kohlenstoff als alle Wälder der Welt zusammen, obwohl sie nur drei Prozent der Landfläche bedecken. Werden sie entwässert, gelangt er in die Luft. In den letzten zehn Jahren haben mehrere Gemeinden begonnen, Gräben zu schließen und das Wasser zurückzuhalten. Schon nach kurzer Zeit kehrten Libellen, Wollgras und seltene Vögel zurück, und die Bauern erproben nun neue Pflanzen, die nasse Böden vertragen.",
    ],
    "fr_FR": [
        "Le village se trouve au fond d'une vallée étroite, entre deux forêts de hêtres. On y arrive par une petite route qui longe la rivière et que la neige ferme parfois pendant plusieurs jours. Les habitants se connaissent tous, et chaque été ils préparent ensemble une grande fête. On y danse jusqu'au matin, on y mange du fromage de brebis, et les anciens racontent l'histoire du loup blanc.",
        "Pour préparer cette soupe, coupez les légumes en petits morceaux et faites-les revenir dans un peu d'huile. Ajoutez ensuite un litre d'eau, du sel et deux feuilles de laurier, puis laissez cuire pendant quarante minutes à feu doux. Quand les carottes sont tendres, retirez le laurier et mixez le tout. Servez la soupe bien chaude avec du pain grillé et une cuillère de crème fraîche.",
        "La bibliothèque municipale a rouvert ses portes après deux ans de travaux. Le bâtiment, qui date de 1904, a gardé ses boiseries et ses grandes fenêtres, mais le chauffage, l'éclairage et les ascenseurs sont neufs. Environ 60 000 ouvrages sont désormais en accès libre. Une salle est réservée aux enfants, une autre aux chercheurs, et le jardin accueille des lectures publiques dès qu'il fait beau.",
    ],
    "es_ES": [
        "La estación de tren se construyó en 1898 con hierro traído por mar. Durante décadas fue la puerta de la ciudad, y todavía hoy miles de personas pasan cada día bajo su gran reloj. Hace poco se restauraron las vidrieras, que habían perdido el color por el humo de las locomotoras. Ahora, cuando el sol de la tarde entra por el oeste, el suelo se llena de azules y de rojos.",
        "Si quiere cultivar tomates en un balcón, elija una maceta honda y tierra rica en nutrientes. Las plantas necesitan al menos seis horas de sol y un riego regular, sin mojar las hojas. Cuando alcancen medio metro, átelas a una caña para que el viento no las rompa. A partir de julio podrá recoger los primeros frutos, que saben mucho mejor que los de cualquier tienda.",
        "El informe señala que el consumo de agua bajó un 12 % en cinco años gracias a la reparación de las tuberías antiguas. Sin embargo, los autores advierten que los pozos del sur siguen perdiendo nivel y que las lluvias llegan cada vez más tarde. Proponen reutilizar el agua depurada en los campos, plantar especies que resistan la sequía y publicar los datos de cada mes.",
    ],
    "pt_BR": [
        "A feira acontece todos os domingos na praça em frente à igreja. Os agricultores chegam de madrugada com caminhões cheios de frutas, verduras, queijos e flores. Minha avó conhecia cada um pelo nome e nunca pagava o preço pedido. Hoje sou eu que levo a sacola dela, e os filhos daqueles vendedores ainda perguntam se quero a mesma couve de sempre, amarrada com uma fita de palha.",
        "O rio nasce nas montanhas e percorre quase trezentos quilômetros antes de chegar ao mar. Ao longo do caminho, abastece doze cidades e irriga plantações de arroz e de cana. Nos últimos anos, porém, o nível caiu tanto que os barcos já não passam em agosto. Pesquisadores da universidade instalaram sensores em várias pontes para entender quanta água se perde e por quê.",
        "Antes de pintar a parede, lixe bem a superfície e remova todo o pó com um pano úmido. Tape os buracos com massa e espere secar por um dia inteiro. Proteja o chão com jornal, misture a tinta devagar para não formar bolhas e aplique a primeira camada com um rolo. Depois de quatro horas, passe a segunda camada no sentido contrário, sem deixar marcas.",
    ],
    "cs_CZ": [
        "Na kraji vesnice stojí starý mlýn, který už dávno nemele. Jeho kolo se zastavilo v roce 1952, kdy vodu z náhonu odvedli do nové přehrady. Současný majitel ho koupil s rozpadlou střechou a deset let ho opravoval po večerech. Dnes je uvnitř malá kavárna, kde se v zimě topí v kachlových kamnech, a v létě sedí hosté venku pod lípou a poslouchají žáby.",
        "Houby sbíráme jen tehdy, když je bezpečně poznáme. Mladé plodnice se dají snadno zaměnit, a proto je dobré mít s sebou zkušeného přítele nebo kvalitní atlas. Do košíku je ukládáme celé, očištěné od hlíny, nikdy ne do igelitové tašky, kde se rychle zapaří. Doma je zpracujeme ještě týž den: část usušíme na sítech, zbytek podusíme na másle s trochou kmínu.",
        "Výzkumníci sledovali po dobu osmi let, jak se mění počet vlaštovek v okolí velkých statků. Zjistili, že ptáků ubývá hlavně tam, kde zmizely otevřené stáje a louže s bahnem, z něhož si stavějí hnízda. Pomoci přitom není těžké: stačí nechat pootevřené okno, postavit umělé hnízdo a nepoužívat postřiky, které hubí hmyz. První výsledky z několika obcí jsou velmi nadějné.",
    ],
    "ja_JP": [
        "祖母の家は海の近くにあり、夏休みになるといつも家族で訪れた。朝は早く起きて、近所の漁師から魚を分けてもらい、庭で採れた野菜と一緒に味噌汁にした。午後になると、弟と二人で岩場に行き、小さな蟹や貝を探したものだ。夕方の風が吹くころ、祖母は縁側で西瓜を切って待っていてくれた。",
        "この装置を初めて使う前に、付属の電池を完全に充電してください。充電にはおよそ三時間かかり、終わると緑色のランプが点灯します。水のかかる場所や、直射日光の当たる場所には置かないでください。異常な音や臭いに気づいたときは、すぐに電源を切り、販売店に相談することをお勧めします。",
        "江戸時代、この町は街道の宿場として栄えた。大名の行列が通る日には、宿の主人たちは道を掃き清め、提灯を掲げて客を迎えたという。鉄道が開通すると人の流れが変わり、多くの宿は店を閉じたが、今でも古い町並みが残っている。近年は若い職人が移り住み、空き家を工房として使い始めている。",
    ],
    "zh_CN": [
        "这座小城坐落在两条河流交汇的地方，四周都是茶园。每年春天，采茶的人天还没亮就上山，趁着露水未干摘下最嫩的叶子。老人们说，好茶要用山泉水来泡，火不能太急，心也不能太急。如今年轻人把茶叶放到网上去卖，但是制作的方法仍然和一百年前差不多，靠的是手上的功夫和耐心。",
        "安装软件之前，请先确认您的电脑有足够的磁盘空间，并且已经备份了重要的文件。安装程序会询问您使用的语言和时区，如果不确定，可以保留默认的选择。整个过程大约需要二十分钟，期间请不要关闭电源。安装完成以后，系统会提示您重新启动，随后就可以用刚才设置的密码登录。",
        "研究人员在这片湿地里观察了三年，记录到一百二十多种鸟类，其中有五种是国家重点保护的动物。他们发现，水位的变化对候鸟的停留时间影响很大：水太深，鸟找不到食物；水太浅，天敌又容易接近。因此，当地政府在附近修建了几道小闸门，根据季节调节水量，效果令人满意。",
    ],
    "uk_UA": [
        "Стара аптека на розі вулиці працює вже понад сто років. На полицях досі стоять порцелянові банки з латинськими написами, хоча ліки тепер привозять у звичайних коробках. Аптекарка пам'ятає кожного постійного відвідувача і завжди питає про здоров'я онуків. Коли взимку вимикали світло, вона запалювала гасову лампу й продовжувала працювати, бо людям потрібна була допомога.",
        "Щоб спекти цей пиріг, візьміть пів кілограма кислих яблук, склянку цукру, три яйця та дві склянки борошна. Яблука почистіть і наріжте тонкими скибками. Яйця збийте з цукром до білої піни, потім обережно додайте борошно й вимішайте тісто дерев'яною ложкою. Викладіть усе у форму, змащену маслом, і печіть сорок хвилин, доки зверху не з'явиться золотиста скоринка.",
        "Учені дослідили, як змінився рівень води в озері за останні п'ятдесят років. Найбільше воно обміліло після посухи, коли селяни почали викопувати глибші колодязі. Тепер громада вирішила відновити старі греблі та посадити вздовж берегів верби, які затримують вологу. Уже за два роки до озера повернулися лелеки, а діти знову вчаться плавати там, де вчилися їхні діди.",
    ],
}
CLEAN["en"].append(
    "What the backup needs:\n- a disk with as much free space as the home folder takes, and a little more for what changes every day;\n- the key that encrypts it, kept somewhere else;\n- half an hour on the first evening, and a minute on each that follows.\n\nRun `backup --to /media/disk` and wait until it says that all files were compared. If it stops, run it again: nothing is copied twice."
)
CLEAN["de_DE"].append(  # a song: its refrain is its nature
    "Am Brunnen vor dem Hause, da wartet still der Mond.\nO komm, du lieber Abend, der in den Bäumen wohnt.\n\nDie Gänse gehen schlafen, der Hund liegt vor dem Tor.\nO komm, du lieber Abend, der in den Bäumen wohnt.\n\nIm Garten singt die Amsel ihr letztes Lied uns vor.\nO komm, du lieber Abend, der in den Bäumen wohnt."
)
_MENU = ["Home", "Products", "About us", "Contact", "News", "Jobs", "Press", "Login", "Help", "Sitemap", "Partners", "Blog"]
_WRONG = [
    ("de_DE", "fr_FR"),
    ("fr_FR", "es_ES"),
    ("es_ES", "pt_BR"),
    ("cs_CZ", "en"),
    ("ja_JP", "zh_CN"),
    ("zh_CN", "ja_JP"),
    ("uk_UA", "en"),
]

NOISY: list[tuple[str, str, str]] = [
    *(("wrong language", code, CLEAN[other][1]) for code, other in _WRONG),
    ("wrong language", "uk_UA", "Старый мост через реку закрыли на ремонт ещё весной, и теперь жители обоих берегов вынуждены ездить в объезд. Дорога занимает почти час, поэтому многие оставляют машины и переправляются на лодке. Власти обещают закончить работы к ноябрю, однако строители говорят, что без хорошей погоды они не успеют. Школьникам на это время разрешили приходить на уроки немного позже обычного."),
    ("repetition", "en", "The best prices for hotels in town are here. " * 12),
    ("repetition", "de_DE", "Günstige Reifen kaufen Sie am besten online.\n" * 10 + "Wir liefern schnell und zuverlässig in ganz Deutschland und Österreich."),
    ("repetition", "fr_FR", "Voir la suite de cet article sur notre site.\n\n" * 8 + "Les archives sont ouvertes à tous les abonnés du journal."),
    ("repetition", "es_ES", "casa barata casa nueva casa grande casa barata casa nueva casa grande casa en venta " * 7),
    ("repetition", "pt_BR", "clique aqui para ver mais fotos do evento e " * 9),
    ("repetition", "cs_CZ", "levné letenky levné zájezdy levné hotely levné letenky " * 10),
    ("repetition", "ja_JP", "ご注文はこちらからどうぞ。お問い合わせはこちらからどうぞ。" * 8),
    ("repetition", "zh_CN", "点击这里查看更多优惠信息，欢迎新老客户前来选购。" * 8),
    ("repetition", "uk_UA", "Купити недорого з доставкою по всій Україні. " * 10),
    ("menu", "en", "\n".join(f"- {word} {n}" for n, word in enumerate(_MENU * 5))),
    ("menu", "de_DE", "\n".join(f"• Abteilung {n} für {word}" for n, word in enumerate(_MENU * 3))),
    ("menu", "fr_FR", " | ".join(f"{n:02d}/{n + 3:02d} {n * 17}" for n in range(1, 40))),
    ("menu", "ja_JP", "\n".join(f"{n}. 03-{n * 37:04d}-{n * 91:04d} ({n}:00〜{n + 9}:30)" for n in range(1, 15))),
    ("menu", "zh_CN", "\n".join(f"[{n}] 2021-{n:02d}-{n + 9} ¥{n * 13}.00 / {n * 29}" for n in range(1, 13))),
    ("teasers", "es_ES", "\n".join(f"El número {n} de la lista de {word} sorprende a los lectores porque..." for n, word in enumerate(_MENU))),
    ("teasers", "uk_UA", "\n".join(f"Новина {n} про місто {word} здивувала всіх читачів, тому що…" for n, word in enumerate(_MENU))),
    ("too short", "en", "Thank you for visiting our page. Come back soon."),
    ("too short", "ja_JP", "ページが見つかりません。もう一度お試しください。"),
    ("boilerplate", "en", "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor. " + CLEAN["en"][0]),
    ("boilerplate", "de_DE", "Wir verwenden Cookies, um Inhalte zu personalisieren und Zugriffe zu zählen.\nEinige Cookies sind notwendig, andere helfen uns, die Seite zu verbessern.\nBitte aktivieren Sie JavaScript, damit die Seite richtig angezeigt wird.\nMit einem Klick stimmen Sie zu, dass wir Cookies auch von Partnern setzen dürfen, die ihren Sitz außerhalb der Union haben.\n© Alle Rechte bei den Autoren, soweit nicht anders angegeben wird."),
    ("boilerplate", "pt_BR", "Este site usa cookies para melhorar a sua experiência de navegação e para fins de estatística.\nAo continuar, você concorda com o uso de cookies conforme a nossa política de privacidade.\nO seu navegador precisa ter JavaScript ativado para ver esta página por completo.\n© Todos os direitos reservados aos autores, salvo quando indicado de outra forma neste mesmo lugar ou na página seguinte."),
    ("markup", "en", "<div class='row'><p>The harbour</p> <p>was built</p> <a href='#'>in</a> <b>the</b> seventeenth century,</div> " * 1 + "<td>when ships</td> <td>from the north</td> <tr>brought salt</tr> and timber. <li>Today most</li> of the old storehouses are homes and <i>only two</i> fishing boats still leave before dawn to the open sea beyond the islands."),
    ("markup", "cs_CZ", "function start(a, b) { if (a) { return b; } else { return null; } } var mlyn = { kolo: 1952, voda: true }; for (let i in mlyn) { console.log(i); } document.addEventListener('load', () => { start(mlyn, {}); }); window.setTimeout(function () { start(null, mlyn); }, 100); export default { start, mlyn }; module.exports = { mlyn }; let strom = { list: 3, koren: { hloubka: 2 } };"),
    ("spam", "en", "Are you still paying too much for your car insurance? Our experts have helped thousands of happy drivers to save money from the very first month. Just fill in the short form, tell us the age of your vehicle and where you live, and receive three free offers within minutes. Do not wait, because this unique chance ends on Sunday at midnight and will never come back!"),
    ("spam", "de_DE", "Endlich schlank ohne Hunger: Mit unserem neuen Pulver verlieren Sie garantiert acht Kilo in zwei Wochen. Ärzte sind sprachlos, Kundinnen begeistert. Rühren Sie einfach jeden Morgen einen Löffel in Ihren Kaffee und sehen Sie zu, wie das Fett schmilzt. Nur heute bekommen Sie drei Dosen zum Preis von zwei, dazu ein Maßband und unser Rezeptheft geschenkt. Bestellen Sie jetzt!"),
    ("word salad", "en", " ".join(sorted(CLEAN["en"][0].split(), key=lambda word: (word[::-1], word)))),
    ("word salad", "fr_FR", " ".join(CLEAN["fr_FR"][0].split()[::-1])),
    ("markup", "fr_FR", CLEAN["fr_FR"][1].encode().decode("latin-1")),
]  # fmt: skip

DOCUMENTS: list[tuple[str, str, str]] = [("", code, text) for code, texts in CLEAN.items() for text in texts] + NOISY
